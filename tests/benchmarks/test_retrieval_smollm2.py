"""Existing results are not repeated, and work without time left waits for the next start."""

import json
import shutil
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "assets/tiny"
LABELS = ("untouched", "EABF, untrained", "EABF, trained")


@pytest.fixture
def program(load_program, monkeypatch):
    """Runs the program; returns its exit status and the models it measured."""
    module = load_program("retrieval_smollm2")
    measured = []

    def evaluate(label, directory, rope, prompts, settings, path):
        measured.append(label)
        cells = [
            {"length": n, "depth": d, "hits": 1, "total": 2, "loss": 0.5} for n in (300, 600) for d in (0, 50, None)
        ]
        part = {"label": label, "settings": settings, "seconds": 50.0, **module.measured_on(), "cells": cells}
        path.write_text(json.dumps(part))
        return part

    monkeypatch.setattr(module, "evaluate", evaluate)

    def start(output, *arguments):
        command = ["x", "--output", str(output), "--base", str(TINY), "--schemes", "eabf", "--lengths", "300,600"]
        monkeypatch.setattr(sys, "argv", [*command, *("--samples", "1", "--line-samples", "1"), *arguments])
        measured.clear()
        with pytest.raises(SystemExit) as ended:
            module.run(module.main)
        return ended.value.code, list(measured)

    return start


def test_a_second_start_goes_on_and_a_third_only_reports(program, tmp_path: Path, capsys) -> None:
    shutil.copytree(TINY, tmp_path / "exported/eabf")  # already trained
    # The first model reports 50 s, so there is no time for another within 40 s.
    assert program(tmp_path, "--time-limit", "40") == (3, [LABELS[2]])
    assert "time is up before evaluating EABF, untrained" in capsys.readouterr().out
    assert program(tmp_path) == (0, [LABELS[1], LABELS[0]])
    assert program(tmp_path) == (0, [])
    for task, hits in (("passkey", 2), ("line_retrieval", 1)):
        written = json.loads((tmp_path / f"{task}.json").read_text())
        assert list(written["cells"]) == list(LABELS)
        assert [(row["length"], row["hits"], row["total"]) for row in written["by_length"]["EABF, trained"]] == [
            (300, hits, 2 * hits), (600, hits, 2 * hits)
        ]  # fmt: skip
        assert written["pretrained_window"] == 512
        assert (tmp_path / f"{task}.png").read_bytes().startswith(b"\x89PNG")
    assert program(tmp_path, "--seed", "1") == (2, [])
    assert "was measured with other settings" in capsys.readouterr().err


def test_nothing_is_trained_without_time(program, tmp_path: Path, capsys) -> None:
    assert program(tmp_path, "--time-limit", "5") == (3, [])
    assert "time is up before training EABF" in capsys.readouterr().out
    assert program(tmp_path, "--schemes", "eabff")[0] == 2
    assert program(tmp_path, "--tasks", "passkeys")[0] == 2
    assert program(tmp_path, "--lengths", "20,600") == (2, [])
    assert "length 20: the question alone has" in capsys.readouterr().err


def test_one_task_alone(program, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "exported/eabf")
    assert program(tmp_path, "--tasks", "passkey") == (0, list(reversed(LABELS)))
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["passkey.json"]
