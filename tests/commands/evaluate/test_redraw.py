"""`eabf evaluate redraw` on old reports and other files; the tests of each evaluation redraw its reports."""

import json
from pathlib import Path

import pytest

from eabf_jax.cli import main
from eabf_jax.evaluation.intervals import clustered


def redraw(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "redraw", *arguments])
    return stop.value.code


@pytest.mark.parametrize(
    "content", ["{}", '{"cells": []}', '{"cells": {"a": [{"length": 1}]}}', '{"cells": {}}', "[]", "x"]
)
def test_what_is_no_report_is_not_drawn(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(content)
    assert redraw(str(tmp_path / "report.json")) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert "is not a report that can be drawn" in error or "JSON" in error


def test_an_older_report_is_read_without_its_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In older reports, cells have their own intervals, over prompts, and there is no note."""
    cells = [
        {"length": n, "depth": d, "hits": 1, "total": 2, "low": 0, "high": 1, "loss": 1} for n in (4, 8) for d in (0, 9)
    ]
    report = {"task": "passkey", "pretrained_window": 4, "interval": "Wilson", "cells": {"a": cells}, "seed": 7}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert redraw(str(tmp_path / "report.json"), "--json", str(tmp_path / "report.json")) == 0
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["seed"] == 7 and "bootstrap" in written["interval"]
    assert written["cells"]["a"][0] == {"length": 4, "depth": 0, "hits": 1, "total": 2, "loss": 1}
    share = clustered([(1, 2), (1, 2)])
    assert written["by_length"]["a"][0] == {"length": 4, **share._asdict()}
