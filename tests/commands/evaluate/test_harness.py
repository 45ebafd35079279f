"""The table of `eabf evaluate harness`; tests/evaluation/test_harness.py compares the command with the HF backend."""

import pytest
from rich.console import Console

from eabf_jax.commands.evaluate.harness import Difference, Report, Score, difference_table, table
from eabf_jax.evaluation import longbench


def test_table_with_the_papers_figures() -> None:
    scores = [
        Score("mine", window, task, "score", 0.1 * number + window / 1e6, 0.01, 5)
        for window in (4096, 32768)
        for number, task in enumerate(longbench.TASKS)
    ]
    mean = longbench.macro_average({score.task: 100 * score.value for score in scores[:12]})
    assert mean == pytest.approx(55.4096)
    assert longbench.macro_average({score.task: score.value for score in scores[:11]}) is None
    report = Report(scores, [Score("mine", 4096, longbench.GROUP, "macro average", mean, None, None)], [])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(report))
    lines = {" ".join(line.replace("│", "|").split()) for line in console.export_text().splitlines()}
    assert "| qasper | score | 10.4 ± 1.0 | 13.3 ± 1.0 |" in lines
    assert "| longbench12 | macro average | 55.4 | |" in lines
    # The paper's figures, by method and window.
    assert "| paper, EABF | macro average | 36.3 | 39.1 |" in lines
    assert "| paper, PI | macro average | 36.2 | 28.4 |" in lines
    assert "| paper, untouched | macro average | 33.0 | |" in lines


def test_table_of_differences_to_the_first_model() -> None:
    scores = [Score(label, 4096, "arc_easy", "acc", 0.5, 0.01, 100) for label in ("first", "second")]
    differences = [
        Difference("second", 4096, "arc_easy", "acc", -0.03, 0.02, 100),
        Difference("second", 8192, "arc_easy", "acc", 0.01, 0.02, 100),
        Difference("second", 8192, "longbench_trec", "score", 0.5, float("nan"), 1),
    ]
    found = difference_table(Report(scores, [], differences)).plain()
    assert found["title"] == "beside first: difference by document (95 % interval)"
    assert found["header"] == ["task", "metric", "second\n4,096", "second\n8,192"]
    assert found["rows"] == [
        ["arc_easy", "acc", "-0.0300 ± 0.0200", "+0.0100 ± 0.0200"],
        ["trec", "score", "", "+50.0"],  # one document has no interval
    ]
    cells = list(difference_table(Report(scores, [], differences)).columns[2].cells)
    assert cells[0] == "[bold]-0.0300 ± 0.0200[/bold]"  # the interval excludes zero
