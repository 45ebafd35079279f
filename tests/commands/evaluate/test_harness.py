"""The table of `eabf evaluate harness`; tests/evaluation/test_harness.py compares the command with the HF backend."""

import pytest
from rich.console import Console

from eabf_jax.commands.evaluate.harness import Report, Score, table
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
    report = Report(scores, [Score("mine", 4096, longbench.GROUP, "macro average", mean, None, None)])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(report))
    lines = {" ".join(line.replace("│", "|").split()) for line in console.export_text().splitlines()}
    assert "| qasper | score | 10.4 ± 1.0 | 13.3 ± 1.0 |" in lines
    assert "| longbench12 | macro average | 55.4 | |" in lines
    # The paper's figures, by method and window.
    assert "| paper, EABF | macro average | 36.3 | 39.1 |" in lines
    assert "| paper, PI | macro average | 36.2 | 28.4 |" in lines
    assert "| paper, untouched | macro average | 33.0 | |" in lines
