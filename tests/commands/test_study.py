"""`eabf study`: dry run, exit statuses and reports; tests/analysis tests what it does."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from studies import study_values, write_inputs, write_study

from eabf_jax import cli
from eabf_jax.analysis import study_run
from eabf_jax.commands import study as command
from eabf_jax.errors import InputError, Stopped
from eabf_jax.training.recipe import configure
from eabf_jax.training.trainer import Preempted, train

CLAIMS = [{"text": "EABF beats PI", "better": "EABF", "worse": "PI", "measure": "loss"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def a_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(configure(str(inputs / "run.yaml"), {"output": str(tmp_path_factory.mktemp("run") / "run")}))


@pytest.fixture
def study(inputs: Path, tmp_path: Path, a_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command on a study, with training replaced by the copy of a run; returns its exit status."""

    def copy(config: Any) -> Path:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(a_run, config.output)
        return Path(config.output)

    monkeypatch.setattr(study_run, "train", copy)
    # Without changes to the settings of the other tests' processes.
    monkeypatch.setattr(command, "gpu_defaults", lambda: None)
    monkeypatch.setattr(command, "use_every_core", lambda rows: None)

    def start(*arguments: str, **changes: Any) -> Any:
        path = write_study(tmp_path / "s.yaml", {**study_values(inputs, tmp_path / "out", claims=CLAIMS), **changes})
        with pytest.raises(SystemExit) as stop:
            cli.main(["study", str(path), *arguments])
        return stop.value.code

    return start


def test_a_study_prints_writes_and_reports_again_without_running(
    study: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study("--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("to do") == 4 and "EABF, 8, seed 0" in shown and "predicted: " in shown
    assert not (tmp_path / "out").exists()
    assert study("--json", str(tmp_path / "first.json")) == 0
    out = capsys.readouterr().out
    assert "EABF beats PI" in out and "data efficiency" in out and f"page: {tmp_path}/out/report.md" in out
    record = json.loads((tmp_path / "out/cells/EABF__8__0.json").read_text())
    assert {"command", "commit", "date", "device", "devices", "versions"} < record.keys()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cells", "loss_by_data.png", "loss_by_window.png", "report.md", "study.yaml",
    ]  # fmt: skip
    assert study("--dry-run") == 0
    assert capsys.readouterr().out.count("done") == 4
    monkeypatch.setattr(command, "Opened", lambda _: pytest.fail("opened the model and the data"))
    assert study("--report-only", "--json", str(tmp_path / "again.json")) == 0
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "again"))
    assert first == again and first["finished"] == 4


def test_failed_cells_have_a_status_of_their_own_and_are_named(
    study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def failing(config: Any) -> Path:
        raise InputError("cannot fit")

    monkeypatch.setattr(study_run, "train", failing)
    assert study() == command.CELLS_FAILED == 4
    out = capsys.readouterr().out
    assert "failed: PI, 8, seed 0: cannot fit\n" in out
    assert "2 of 4 cells failed; run the same command to try them again\n" in out
    assert "- PI, 8, seed 0: cannot fit" in (tmp_path / "out/report.md").read_text()


def test_the_time_limit_has_a_status_of_its_own(
    study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_run.Opened, "seconds", lambda *_: 1e6)
    assert study("--time-limit", "60") == command.TIME_IS_UP == 3
    out = capsys.readouterr().out
    assert "no cell is finished" in out and "time is up with 0 of 4 cells; run the same command to continue" in out


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        (Preempted(1, 2, signal.SIGTERM, resumable=True), 3),
        (Preempted(1, 2, signal.SIGTERM, resumable=False), 3),
        (Preempted(1, 2, signal.SIGINT, resumable=True), 130),
        (Stopped("terminated", 143), 3),  # while a cell is measured
    ],
    ids=str,
)
def test_a_signal_during_training_ends_the_study(
    study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: Stopped, status: int
) -> None:
    def stopped(config: Any) -> Path:
        raise stop

    monkeypatch.setattr(study_run, "train", stopped)
    assert study() == status
    assert len(list((tmp_path / "out/cells").iterdir())) == 2  # those without training


def test_a_dry_run_names_cells_that_cannot_run_or_have_changed(
    study: Callable[..., Any], inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = [{"directory": str(inputs / "train"), "recipe.batch_size": 24}]
    assert study("--dry-run", data={"0": [], "24": big}) == 4
    out = capsys.readouterr().out
    assert out.count("cannot run") == 2 and "fewer than one batch of 24" in " ".join(out.split())
    assert study() == 0
    capsys.readouterr()
    assert study("--dry-run", settings={"recipe.beta1": 0.5}) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "made with other settings" in out and "recipe.beta1 0.9 is now 0.5" in out and "--replace runs it" in out


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("--only", "EABF,YaRN"), {}, "unknown method in --only 'YaRN': known: EABF, PI"),
        (("--time-limit", "0"), {}, "--time-limit 0: a positive number of seconds is needed"),
        ((), {"seeds": []}, "study key 'seeds' is empty"),
        ((), {"config": "none.yaml"}, "cannot read the configuration 'none.yaml'"),
        ((), {"output": "tests"}, "output tests holds analysis and no study.yaml, so it is no study's directory"),
        (("--json", "."), {}, "--json . is a directory"),
    ],
)
def test_bad_input_is_one_line(
    study: Callable[..., Any],
    arguments: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert study(*arguments, **changes) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and message in shown.err


def test_a_users_own_scratch_folder_is_not_removed(
    study: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "out/scratch/thesis.tex"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert study() == 2
    assert "holds scratch and no study.yaml" in capsys.readouterr().err
    assert own.read_text() == "mine"


def test_the_compilation_cache_of_a_user_is_kept(study: Callable[..., Any]) -> None:
    before = jax.config.jax_compilation_cache_dir  # set by conftest.py
    assert study("--only", "EABF") == 0
    assert jax.config.jax_compilation_cache_dir == before is not None
