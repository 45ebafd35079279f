"""Tables on terminals of several widths and in a pipe, with every name and every figure."""

import re

import pytest
from rich.console import Console

from eabf_jax import console
from eabf_jax.console import Grid, show

NAMES = ["untouched", "SmolLM2-135M-Instruct, a name [of] several words"]
FIGURES = ["2.374 (60–100)", "1,234.567", "[bold]4.957[/bold]", "6.035 (0–30)"]


@pytest.fixture
def grid() -> Grid:
    grid = Grid(
        ["model"], ["0-256", "a window of 1,024 tokens", "512-1,024", "beyond"], title="loss [nats], 32 documents"
    )
    for name in NAMES:
        grid.add([name], FIGURES)
    grid.caption = "the end"
    return grid


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(console, "Console", lambda: Console(force_terminal=True, width=width, color_system=None))


def rows(out: str) -> list[list[str]]:
    """Returns the cells of the rows of all tables."""
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines() if line[:1] in "│┃"]


@pytest.mark.parametrize(("width", "tables"), [(200, 1), (80, 1), (60, 2), (40, 3), (10, 4)])
def test_names_wrap_and_figures_do_not(
    grid: Grid, width: int, tables: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch, width)
    show(grid)
    out = capsys.readouterr().out
    assert "…" not in out
    assert out.count("┏") == tables
    if width >= 40:
        assert max(map(len, out.splitlines())) <= width
    cells = [cell for row in rows(out) for cell in row[1:]]
    for figure in FIGURES:
        assert cells.count(re.sub(r"\[/?bold\]", "", figure)) == len(NAMES)
    # The names in each table, joined from their lines.
    names = "".join(row[0].replace(" ", "") for row in rows(out))
    assert [names.count(name.replace(" ", "")) for name in NAMES] == [tables, tables]
    assert out.count("the end") == 1 and "loss [nats]," in " ".join(out.split())


def test_a_pipe_gets_whole_lines(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    show(grid)
    lines = rows(capsys.readouterr().out)
    assert [row[0] for row in lines[-2:]] == NAMES
    assert lines[-1][1:] == ["2.374 (60–100)", "1,234.567", "4.957", "6.035 (0–30)"]


def test_as_text(grid: Grid) -> None:
    found = grid.plain()
    assert found["title"] == "loss [nats], 32 documents"
    assert found["header"] == ["model", "0-256", "a window of 1,024 tokens", "512-1,024", "beyond"]
    assert found["rows"][1] == [NAMES[1], "2.374 (60–100)", "1,234.567", "4.957", "6.035 (0–30)"]
