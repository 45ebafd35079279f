"""Cells against training and measuring by hand; failures, changes, time limits and kills cost no finished cell."""

import dataclasses
import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from studies import BEYOND, WINDOW, records, study_values, write_inputs, write_study

from eabf_jax import load
from eabf_jax.analysis import study_run
from eabf_jax.analysis.study import Study, load_study
from eabf_jax.analysis.study_report import as_json, read_results
from eabf_jax.analysis.study_run import Job, Opened, Outcome, chosen, differences, run
from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter, Records
from eabf_jax.errors import InputError
from eabf_jax.evaluation.perplexity import position_losses
from eabf_jax.training.recipe import configure
from eabf_jax.training.trainer import Diverged, train

ORIGIN = {"command": "c", "date": "d", "device": "cpu", "devices": 8, "versions": {}, "commit": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def build(inputs: Path, tmp_path: Path) -> Callable[..., Study]:
    def load(**changes: Any) -> Study:
        return load_study(str(write_study(tmp_path / "s.yaml", study_values(inputs, tmp_path / "out", **changes))))

    return load


def start(study: Study, **options: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    return run(Opened(study), lambda: ORIGIN, said.append, **options), said


@pytest.fixture(scope="module")
def a_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(configure(str(inputs / "run.yaml"), {"output": str(tmp_path_factory.mktemp("run") / "run")}))


@pytest.fixture
def quick(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Replaces training by the copy of a run; returns that function."""

    def copy(config: Any) -> Path:
        return Path(shutil.copytree(a_run, config.output))

    monkeypatch.setattr(study_run, "train", copy)
    return copy


def by_hand(inputs: Path, directory: str, rope: Any = None) -> np.ndarray:
    """Returns the losses of the test documents but the first, whose conversation is trained on."""
    documents = Records(inputs / "test", "held_out")
    tokens = np.stack([documents[number]["tokens"] for number in range(1, 6)])
    return position_losses(load(directory, rope, "float32")[0], tokens).astype(np.float64)


def values_of(record: dict[str, Any], window: int, band: list[int]) -> list[float]:
    [found] = [x["values"] for x in record["values"] if x["window"] == window and x["band"] == band]
    return list(found)


def test_cells_are_trained_and_measured_as_by_hand(build: Callable[..., Study], inputs: Path, tmp_path: Path) -> None:
    rope = {"type": "eabf", "base": 30_000, "pretrained_window": 16}  # of the second stage, whose scheme is measured
    more = {"directory": str(inputs / "more"), "recipe.epochs": 2, "recipe.learning_rate": 3e-2, "rope": rope}
    first = {"directory": str(inputs / "train"), "samples": 8}
    study = build(methods={"EABF": {}}, data={"0": [], "8": [first], "8, more": [first, more]}, seeds=[5])
    outcome, said = start(study)
    assert outcome == Outcome(3, 3, [], True) and len(said) == 3
    found = records(study.directory)
    assert set(found) == {"EABF__0__5", "EABF__8__5", "EABF__8_more__5"}

    common = {"recipe.seed": 5, "data.samples": 8, "output": str(tmp_path / "one")}
    config = configure(str(inputs / "run.yaml"), common)
    run_one = train(config)
    second = {"model.path": str(run_one), "model.window": 16, "output": str(tmp_path / "two"), "recipe.epochs": 2}
    second |= {"data.directory": str(inputs / "more"), "recipe.learning_rate": 3e-2, "recipe.seed": 5, "rope": rope}
    run_two = train(configure(str(inputs / "run.yaml"), second))
    expected = {
        "EABF__0__5": by_hand(inputs, str(inputs / "model"), config.scheme),
        "EABF__8__5": by_hand(inputs, str(run_one)),
        "EABF__8_more__5": by_hand(inputs, str(run_two)),
    }
    for name, losses in expected.items():
        record = found[name]
        # Rows on eight devices or on one: float32 sums in another order.
        assert values_of(record, BEYOND, [WINDOW, BEYOND]) == pytest.approx(losses[:, 31:].mean(1), rel=1e-5)
        assert values_of(record, 16, [0, 16]) == pytest.approx(losses[:, :15].mean(1), rel=1e-5)
        assert record["units"]["loss"] == [f"t{number}#0" for number in range(5)]
        assert record | ORIGIN == record
    means = [losses.mean() for losses in expected.values()]
    assert len({round(mean, 3) for mean in means}) == 3  # training and its second stage make a difference
    assert [stage["steps"] for stage in found["EABF__8_more__5"]["training"]] == [1, 2]
    assert found["EABF__0__5"]["seed"] is None and found["EABF__8__5"]["seed"] == 5
    assert not (study.directory / "scratch").exists() and not (study.directory / "runs").exists()


def test_runs_are_kept_if_asked_for(build: Callable[..., Study], quick: Callable[[Any], Path]) -> None:
    study = build(methods={"EABF": {}}, keep_runs=True)
    start(study)
    [kept] = (study.directory / "runs").iterdir()
    assert kept.name == "EABF__8__0" and load(kept)[0].config.max_position_embeddings == WINDOW


@pytest.fixture
def tune(inputs: Path) -> dict[str, Any]:
    documents = {"directory": str(inputs / "train"), "count": 2}
    return {"values": {"recipe.learning_rate": [1e-5, 1e-2, 1e30]}, "data": "8", "documents": documents}


def test_the_tuned_value_with_the_lowest_loss_is_used(
    build: Callable[..., Study], tune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def recorded(config: Any) -> Path:
        rates.append(config.recipe.learning_rate)
        return train(config)

    monkeypatch.setattr(study_run, "train", recorded)
    study = build(tune=tune, methods={"EABF": {}})
    outcome, _ = start(study)
    assert outcome.done == outcome.cells == 5 and not outcome.failed
    assert rates == [1e-5, 1e-2, 1e30, rates[-1]]
    losses = {}
    for path in (study.directory / "tuning").glob("*.json"):
        record = json.loads(path.read_text())
        assert ("diverged" in record) == (record["tuned"]["recipe.learning_rate"] == 1e30)
        if record["values"]:
            losses[record["tuned"]["recipe.learning_rate"]] = np.mean(record["values"][0]["values"])
    assert rates[-1] == min(losses, key=lambda rate: losses[rate])
    record = records(study.directory)["EABF__8__0"]
    assert record["tuned"] == {"recipe.learning_rate": rates[-1]}
    assert record["config"][0]["recipe"]["learning_rate"] == rates[-1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Diverged("not finite at step 1"), "no settings could be chosen, because no tuning run succeeded"),
        (InputError("cannot fit"), "it waits for tuning runs that failed"),
    ],
)
def test_cells_whose_tuning_fails_count_as_failed(
    build: Callable[..., Study], tune: dict[str, Any], error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any) -> Path:
        raise error

    monkeypatch.setattr(study_run, "train", failing)
    outcome, _ = start(build(tune=tune, methods={"EABF": {}}))
    diverged = isinstance(error, Diverged)
    assert outcome.done == (3 if diverged else 0) and outcome.in_time
    assert [job.note for job in outcome.failed] == [*([] if diverged else ["cannot fit"] * 3), reason, reason]


def test_a_choice_that_moves_does_not_replace_finished_cells(
    build: Callable[..., Study], quick: Callable[[Any], Path], tune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {1e-3: 2.0, 2e-3: 1.0, 3e-3: 0.5}
    monkeypatch.setattr(study_run, "tuning_loss", lambda record: losses[record["tuned"]["recipe.learning_rate"]])
    keys = {"methods": {"EABF": {}}, "data": {"8": build().data["8"]}}
    tried = {**tune, "values": {"recipe.learning_rate": [1e-3, 2e-3]}}
    start(build(tune=tried, **keys))
    study = build(tune={**tried, "values": {"recipe.learning_rate": [1e-3, 2e-3, 3e-3]}}, **keys)
    before = records(study.directory)
    with pytest.raises(InputError, match=r"made with other settings \(.*learning_rate 0.002 is now 0.003"):
        start(study)
    assert records(study.directory) == before


def test_a_method_waits_until_all_its_values_are_tried(build: Callable[..., Study], tune: dict[str, Any]) -> None:
    opened = Opened(build(tune=tune))
    jobs = opened.jobs()
    assert [job.state for job in jobs] == ["to do"] * 6 + ["waiting"] * 4
    done = [dataclasses.replace(job, state="done", record=_tuned(job, 1.0)) for job in jobs[:6]]
    assert chosen([*done[:5], jobs[5]]) == {"PI": {"recipe.learning_rate": 1e-5}}
    done[1] = dataclasses.replace(done[1], record=_tuned(done[1], 0.5))
    assert chosen(done)["PI"] == {"recipe.learning_rate": 1e-2}


def _tuned(job: Job, loss: float) -> dict[str, Any]:
    return {"tuned": dict(job.cell.tried or ()), "values": [{"values": [loss, loss]}]}


def test_a_cell_that_fails_says_why_and_the_others_go_on(
    build: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, quick: Callable[[Any], Path]
) -> None:
    broken = {"1": InputError("cannot fit"), "2": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory")}

    def failing(config: Any) -> Path:
        if (error := broken.get(str(config.recipe.seed))) is not None:
            raise error
        return quick(config)

    monkeypatch.setattr(study_run, "train", failing)
    study = build(methods={"EABF": {}}, seeds=[0, 1, 2, 3])
    outcome, said = start(study)
    reasons = ["cannot fit", "RESOURCE_EXHAUSTED: out of memory"]
    assert [job.note for job in outcome.failed] == reasons
    assert (outcome.done, outcome.cells) == (3, 5)
    assert said[2] == "EABF, 8, seed 1: failed: cannot fit"
    assert [job.state for job in Opened(study).jobs()] == ["done", "done", "failed", "failed", "done"]
    before = {name: record["date"] for name, record in records(study.directory).items()}
    assert len(before) == 3
    broken.clear()
    outcome, said = start(study)
    assert outcome == Outcome(5, 5, [], True) and len(said) == 2
    assert not list(study.directory.glob("cells/*.failed.json"))


def test_a_loss_that_is_not_finite_is_a_failed_cell(
    build: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eabf_jax.analysis import measures

    losses = measures.position_losses
    monkeypatch.setattr(measures, "position_losses", lambda *args, **kw: losses(*args, **kw) * np.float32(np.nan))
    outcome, _ = start(build(methods={"EABF": {}}, data={"0": []}))
    assert [job.note for job in outcome.failed] == [
        "the loss is not finite; check the weights, or use compute.dtype float32"
    ]


def test_a_cell_that_cannot_run_is_reported_before_others_are_trained(
    build: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, inputs: Path
) -> None:
    data = {"8": [{"directory": str(inputs / "train"), "samples": 8}], "24": [{"directory": str(inputs / "train")}]}
    data["24"][0]["recipe.batch_size"] = 24
    monkeypatch.setattr(study_run, "train", lambda config: pytest.fail("trained"))
    study = build(methods={"EABF": {}}, data=data)
    opened = Opened(study)
    jobs = opened.jobs()
    assert opened.refusal(jobs[0]) is None
    assert "has 16 records, fewer than one batch of 24" in str(opened.refusal(jobs[1]))
    outcome, said = start(study, time_limit=1e-9)
    assert not outcome.in_time and [job.cell.data for job in outcome.failed] == ["24"]
    assert said == [f"EABF, 24, seed 0: failed: {outcome.failed[0].note}"]


def test_changed_settings_are_refused_and_replaced_on_request(
    build: Callable[..., Study], quick: Callable[[Any], Path]
) -> None:
    study = build(settings={"recipe.beta1": 0.9})
    start(study)
    changed = build(settings={"recipe.beta1": 0.8, "compute.loss_chunk": 16})
    with pytest.raises(InputError, match=r"PI, 8, seed 0 and 1 more was made with other settings \(stages.0.recipe.be"):
        start(changed)
    outcome, said = start(changed, replace=True)
    # Without training, nothing has changed. Settings that only say how something is computed do not count.
    assert outcome.done == 4 and [line.split(":")[0] for line in said] == ["PI, 8, seed 0", "EABF, 8, seed 0"]
    assert records(study.directory)["PI__8__0"]["config"][0]["recipe"]["beta1"] == 0.8
    wider = build(settings={"recipe.beta1": 0.8}, methods={"PI": {"rope": {"type": "pi", "factor": 2}}, "EABF": {}})
    assert [job.state for job in Opened(wider).jobs()] == ["done"] * 4
    others = build(settings={"recipe.beta1": 0.8}, evaluate={**_evaluate(study), "windows": [16, WINDOW]})
    assert {job.state for job in Opened(others).jobs()} == {"changed"}


def _evaluate(study: Study) -> dict[str, Any]:
    return {
        "documents": {"directory": study.evaluate.documents.directory, "count": 5},
        "windows": [16, WINDOW, BEYOND],
        "measures": {"loss": {}},
    }


def test_differences_name_the_key_and_both_values() -> None:
    before = {"stages": [{"a": 1, "b": [1, 2]}], "c": {"d": None}}
    assert differences(before, {"stages": [{"a": 2, "b": [1, 3]}], "c": {"d": None}, "e": 4}) == [
        "stages.0.a 1 is now 2",
        "stages.0.b [1, 2] is now [1, 3]",
        "e None is now 4",
    ]
    assert differences(before, before) == []


def test_only_the_methods_asked_for_are_run(build: Callable[..., Study], quick: Callable[[Any], Path]) -> None:
    outcome, said = start(build(), methods=["EABF"])
    assert (outcome.done, outcome.cells) == (2, 2) and all(line.startswith("EABF") for line in said)


def test_the_time_limit_stops_before_a_cell_that_would_end_later(
    build: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, quick: Callable[[Any], Path]
) -> None:
    study = build()
    clock = itertools.count(0, 10)  # each look at the clock takes ten seconds
    monkeypatch.setattr(study_run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    outcome, said = start(study, time_limit=200.0)
    assert not outcome.in_time and 0 < outcome.done == len(said) < 4
    opened = Opened(study)
    jobs = opened.jobs()
    # The median of the finished cells on the same data: training, and one measure, each of ten seconds.
    assert opened.seconds(jobs[0], jobs) == 20
    outcome, further = start(study)
    assert outcome.in_time and outcome.done == 4 and len(said) + len(further) == 4


def test_without_finished_cells_the_time_is_the_planners(build: Callable[..., Study]) -> None:
    opened = Opened(build())
    jobs = opened.jobs()
    untrained, trained = opened.seconds(jobs[0], jobs), opened.seconds(jobs[2], jobs)
    assert untrained is not None and trained is not None and 0 < untrained < trained < 10


@pytest.mark.parametrize(
    ("documents", "windows", "message"),
    [
        ({"count": 7}, [16, 32], "6 documents are left in split 'held_out' of .* of conversations .* 7 are needed"),
        ({"first": 9}, [16, 32], "0 documents are left"),
        ({}, [16, 65], r"study key 'evaluate.documents': document t0#0 .* has 64 tokens; 65 are needed"),
        ({"split": "x"}, [16], "unknown split of .* 'x'"),
    ],
)
def test_documents_that_do_not_do(
    build: Callable[..., Study], inputs: Path, documents: dict[str, Any], windows: list[int], message: str
) -> None:
    told = {"directory": str(inputs / "test"), **documents}
    with pytest.raises(InputError, match=message) as error:
        Opened(build(evaluate={"documents": told, "windows": windows, "measures": {"loss": {}}}))
    assert "\n" not in str(error.value)


def test_documents_of_tuning_are_not_measured(build: Callable[..., Study], inputs: Path) -> None:
    documents = {"directory": str(inputs / "test"), "count": 2}
    tune = {"values": {"recipe.learning_rate": [1e-3]}, "data": "8", "documents": documents}
    values = {"documents": {"directory": str(inputs / "test")}, "windows": [16], "measures": {"loss": {}}}
    opened = Opened(build(tune=tune, evaluate=values))
    assert opened.tuning["loss"].units["loss"] == ["t0#0", "t1#0"]
    assert opened.measures["loss"].units["loss"] == ["t2#0", "t3#0", "t4#0", "t5#0"]


def test_windows_that_differ_are_refused(build: Callable[..., Study]) -> None:
    with pytest.raises(InputError, match="EABF, 0, seed 0: the window differs"):
        Opened(build(methods={"PI": {}, "EABF": {"window": 48}}))


def test_documents_with_more_tokens_than_the_model_has_are_refused(
    build: Callable[..., Study], inputs: Path, tmp_path: Path
) -> None:
    with DatasetWriter(tmp_path / "other") as writer:
        writer.add("held_out", Encoded(np.full(BEYOND, 61, np.int32), np.ones(BEYOND, bool)), "o")
        writer.finish({"vocab_size": 62})
    values = {"documents": {"directory": str(tmp_path / "other")}, "windows": [16], "measures": {"loss": {}}}
    with pytest.raises(InputError, match="was tokenized with 62 tokens; the model's embedding has 61 rows"):
        Opened(build(evaluate=values))


# Ends its process by SIGKILL at the event of this number. Events are the beginning and end of a training, the losses of
# a model, and three moments of writing a cell: before, between writing and renaming, and after.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from eabf_jax import cli
from eabf_jax.analysis import measures, study_run
remaining = int(os.environ["KILL_AT"])
def event():
    global remaining
    remaining -= 1
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def around(module, name):
    function = getattr(module, name)
    def wrapped(*arguments, **options):
        event()
        found = function(*arguments, **options)
        event()
        return found
    setattr(module, name, wrapped)
for module, name in ((study_run, "train"), (study_run, "write_json"), (measures, "position_losses")):
    around(module, name)
replace = Path.replace
def renamed(self, target):
    if Path(target).parent.name in ("cells", "tuning"):
        event()
    return replace(self, target)
Path.replace = renamed
sys.argv[0] = "eabf"
cli.main(["study", *sys.argv[1:]])
"""


def test_killed_at_random_moments_no_finished_cell_is_repeated_and_tables_are_the_same(
    inputs: Path, tmp_path: Path, fork: Callable[..., Any]
) -> None:
    claims = [{"text": "EABF beats PI", "better": "EABF", "worse": "PI", "measure": "loss"}]
    shared = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    written = {}
    for name in ("whole", "cut"):
        values = study_values(inputs, tmp_path / name, claims=claims)
        written[name] = write_study(tmp_path / f"{name}.yaml", values)
    process = fork(PROGRAM, written["whole"], KILL_AT="0", **shared)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "EABF beats PI" in out

    cells = tmp_path / "cut" / "cells"
    seen: dict[str, tuple[int, str]] = {}
    draw = random.Random(13)
    # Two kills at random, one between the writing of the next cell and its renaming, then no more.
    for kill_at in (draw.randint(2, 8), draw.randint(2, 12), 4, 0):
        process = fork(PROGRAM, written["cut"], KILL_AT=str(kill_at), **shared)
        out, err = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if kill_at else 0), err
        now = {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in cells.glob("[!.]*.json")}
        assert seen.items() <= now.items()
        for _, text in now.values():
            json.loads(text)  # none is half written
        seen = now
    assert len(seen) == 4
    reports = [as_json(read_results(load_study(str(path)))) for path in written.values()]
    for report in reports:
        del report["study"], report["measured_on"]
    assert reports[0] == reports[1]
    assert sorted(path.name for path in cells.iterdir()) == sorted(seen)
    assert not (tmp_path / "cut" / "scratch").exists()
