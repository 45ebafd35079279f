"""Runs a study: each cell is trained, measured, and written to a file of its own.

The directory of a study holds `cells/` and `tuning/` with one JSON file for each finished cell, and
`NAME.failed.json` for a failed one. A file is written atomically when its cell ends, so a process that is killed loses
only the cell it is working on. `scratch/` holds that cell's runs.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import io
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from eabf_jax.analysis.measures import MEASURES, Inputs, Prepared, Values, as_settings
from eabf_jax.analysis.study import (
    SCRATCH,
    Cell,
    Documents,
    Study,
    configurations,
    measured_cells,
    tuning_cells,
)
from eabf_jax.data.dataset import Records, read_metadata
from eabf_jax.errors import InputError, one_line
from eabf_jax.evaluation.scorer import evaluation_mesh
from eabf_jax.hardware import device_at_hand
from eabf_jax.interop.adapter import digest as model_digest
from eabf_jax.interop.directory import read_json_object, write_json
from eabf_jax.interop.huggingface import open_leaves
from eabf_jax.interop.loading import load
from eabf_jax.interop.native import METRICS_FILE
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.reading import parse_json, parse_yaml, read_text, reading
from eabf_jax.rope import Scheme
from eabf_jax.training.plan import EFFICIENCY, Plan
from eabf_jax.training.recipe import TrainConfig, configure, dump_config, lasting_values
from eabf_jax.training.tracking import flops_per_token
from eabf_jax.training.trainer import (
    Diverged,
    base_config,
    check_vocabularies,
    extended_config,
    settle,
    tokenizer_source,
    train,
)

_RUNS = "runs"  # the trained models, if they are kept

State = Literal["done", "failed", "changed", "waiting", "to do"]


@dataclass(frozen=True)
class Job:
    """A cell with all that decides its result."""

    cell: Cell
    tuned: Mapping[str, Any]  # values chosen for its method; the first to try while it waits for tuning
    configs: Sequence[TrainConfig]
    settings: Mapping[str, Any]  # JSON values; a finished cell with other ones is not this one
    state: State
    note: str = ""  # why it failed, or what has changed
    record: Mapping[str, Any] | None = None  # of a finished or changed cell


class Opened:
    """A study with its model, its documents and its measures."""

    def __init__(self, study: Study):
        """Reads documents and tokenizer, and prepares the measures.

        Raises:
          InputError: the model or a dataset is missing; a document is shorter than the longest window; a measure does
            not fit; a configuration of a cell is wrong.
        """
        self.study = study
        self._made: dict[tuple[Cell, str], tuple[list[TrainConfig], dict[str, Any]]] = {}
        tuning, measured = tuning_cells(study), measured_cells(study)
        # Configurations of a method differ only in values, so the first to try stands for the chosen ones.
        self._first = first = {cell.method: dict(cell.tried or ()) for cell in reversed(tuning)}
        tried = {cell: configurations(study, cell, dict(cell.tried or ())) for cell in tuning}
        tried |= {cell: configurations(study, cell, first.get(cell.method, {})) for cell in measured}
        window = study.trained_window
        seen: set[str] = set()
        for cell, configs in tried.items():
            if any(config.window != window for config in configs):
                raise InputError(f"{cell.label}: the window differs; a study trains every method for one window")
            for config in configs if study.data[cell.data] else ():
                seen |= _conversations(config.data.directory, config.data.split, config.data.samples)
        config = tried[measured[0]][0]
        source = tokenizer_source(config)
        tokenizer = None if source is None else load_tokenizer(source)
        for documents in (study.evaluate.documents, *([study.tune.documents] if study.tune else [])):
            check_vocabularies(documents.directory, base_config(config), source, tokenizer)
        self.tuning: dict[str, Prepared] = {}
        self._tuning_settings: dict[str, Any] = {}
        if study.tune is not None:
            # A document counts for tuning or for measuring, never for both.
            names, tokens = read_documents(study.tune.documents, "tune.documents", window, seen)
            seen |= set(map(_conversation, names))
            inputs = Inputs(tokens, names, tokenizer, [window], study.evaluate.batch_size)
            loss = MEASURES["loss"]
            self.tuning = {"loss": loss.prepare(loss.settings(), inputs)}
            self._tuning_settings = {"documents": _documents_digest(names, tokens), "windows": [window]}
        windows = list(study.evaluate.windows)
        names, tokens = read_documents(study.evaluate.documents, "evaluate.documents", windows[-1], seen)
        inputs = Inputs(tokens, names, tokenizer, windows, study.evaluate.batch_size)
        self.measures = {name: MEASURES[name].prepare(settings, inputs) for name, settings in study.measures.items()}
        self._settings = {
            "documents": _documents_digest(names, tokens),
            "windows": windows,
            "measures": {name: as_settings(settings) for name, settings in study.measures.items()},
            "inputs": {name: measure.digest for name, measure in self.measures.items() if measure.digest},
        }

    def jobs(self) -> list[Job]:
        """Returns every cell with its state, the cells that tune first."""
        tuning = [self._job(cell, dict(cell.tried or ())) for cell in tuning_cells(self.study)]
        found = chosen(tuning)
        by_method: dict[str, Any] = {job.cell.method: found.get(job.cell.method) for job in tuning}
        return [*tuning, *(self._job(cell, by_method.get(cell.method, {})) for cell in measured_cells(self.study))]

    def _job(self, cell: Cell, tuned: Mapping[str, Any] | None) -> Job:
        """Returns a cell with its state; `tuned` is None if its method's settings are not chosen yet."""
        if tuned is None:
            first = self._first[cell.method]
            return Job(cell, first, configurations(self.study, cell, first), {}, "waiting", "for tuning")
        key = (cell, json.dumps(tuned))
        if key not in self._made:
            configs = configurations(self.study, cell, tuned)
            settings = {
                "model": _model_digest(configs[0].model.path),
                "stages": [_stage_settings(config, bool(self.study.data[cell.data])) for config in configs],
                **(self._settings if cell.tried is None else self._tuning_settings),
            }
            self._made[key] = configs, json.loads(json.dumps(settings))
        configs, settings = self._made[key]
        path = self.study.directory / f"{cell.name}.json"
        if path.is_file():
            record = read_json_object(path)
            changes = differences(record.get("settings", {}), settings)
            if not changes:
                return Job(cell, tuned, configs, settings, "done", "", record)
            return Job(cell, tuned, configs, settings, "changed", "; ".join(changes), record)
        failed = self.study.directory / f"{cell.name}.failed.json"
        if failed.is_file():
            return Job(cell, tuned, configs, settings, "failed", str(read_json_object(failed).get("reason", "")))
        return Job(cell, tuned, configs, settings, "to do")

    def refusal(self, job: Job) -> str | None:
        """Returns why a cell cannot run on this machine, or None."""
        try:
            self._plans(job)
        except InputError as error:
            return str(error)
        return None

    def _plans(self, job: Job) -> list[tuple[Plan, int]]:
        """Returns plan and steps of each training stage; raises InputError for one that cannot run."""
        if not self.study.data[job.cell.data]:
            config = job.configs[0]
            if config.model.path is None:
                raise InputError("without training, model.path is needed; the configuration has a shape alone")
            extended_config(config, base_config(config))
            return []
        return [_settled(_without_seed(config)) for config in job.configs]

    def seconds(self, job: Job, jobs: Sequence[Job]) -> float | None:
        """Predicts a cell's time: from finished cells of its kind, else from the plans of its steps, else None."""

        def kind(cell: Cell) -> tuple[bool, str]:
            return cell.tried is None, cell.data

        here = jax.devices()[0].device_kind
        found = [
            total_seconds(other.record)
            for other in jobs
            if other.record and other.record["device"] == here and kind(other.cell) == kind(job.cell)
        ]
        if found:
            return statistics.median(found)
        try:
            training = sum(plan.seconds * steps for plan, steps in self._plans(job))
            device = device_at_hand()
        except InputError:
            return None
        config = job.configs[-1]
        model_config = extended_config(config, base_config(config))
        measures = self.measures if job.cell.tried is None else self.tuning
        tokens = sum(measure.tokens for measure in measures.values()) / jax.device_count()
        flops = flops_per_token(model_config, self.study.evaluate.windows[-1]) / 3  # of the forward pass alone
        return training + tokens * flops / (EFFICIENCY * device.flops)

    def run(self, job: Job) -> dict[str, Any]:
        """Trains and measures a cell.

        Returns:
          Its record: JSON values.
        Raises:
          InputError: as for `train`, or the loss is not finite.
          Preempted: a signal stopped the training.
        """
        scratch = self.study.directory / SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            trained = []
            began = time.monotonic()
            config = job.configs[0]
            directory = config.model.path
            rope: Scheme | None = config.scheme
            if self.study.data[job.cell.data]:
                first = base_config(config)
                for number, config in enumerate(job.configs):
                    if number:
                        # The model of the stage before already has the new window and must count as not extended.
                        base = dataclasses.replace(
                            config.model, path=directory, shape=None, window=first.max_position_embeddings
                        )
                        config = dataclasses.replace(config, model=base)
                    with contextlib.redirect_stderr(io.StringIO()):
                        directory = str(train(config))
                    trained.append(_metrics(Path(directory)))
                rope = None  # that of the last stage
            seconds = {"training": time.monotonic() - began}
            mesh = evaluation_mesh(extended_config(config), config.compute.dtype)
            model = load(str(directory), rope, config.compute.dtype, mesh)[0]
            found: list[Values] = []
            measures = self.measures if job.cell.tried is None else self.tuning
            for name, measure in measures.items():
                began = time.monotonic()
                found += measure.run(model)
                seconds[name] = time.monotonic() - began
            if self.study.keep_runs and trained and job.cell.tried is None:
                kept = self.study.directory / _RUNS / Path(job.cell.name).name
                shutil.rmtree(kept, ignore_errors=True)
                kept.parent.mkdir(parents=True, exist_ok=True)
                Path(str(directory)).rename(kept)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return {
            "method": job.cell.method,
            "data": job.cell.data,
            "seed": job.cell.seed if trained else None,
            "tuned": dict(job.tuned),
            "settings": job.settings,
            "config": [parse_yaml(dump_config(config), "the configuration") for config in job.configs],
            "training": trained,
            "seconds": seconds,
            "units": {name: list(units) for measure in measures.values() for name, units in measure.units.items()},
            "values": [{**values.column._asdict(), "values": values.values} for values in found],
        }


class Outcome(NamedTuple):
    """How a start of a study ended."""

    done: int  # finished cells, those of earlier starts included
    cells: int
    failed: list[Job]  # with their reasons
    in_time: bool  # False if the time limit left cells undone


def run(
    opened: Opened,
    origin: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
    *,
    methods: Sequence[str] | None = None,
    replace: bool = False,
    time_limit: float | None = None,
) -> Outcome:
    """Runs every cell that is not finished, and writes a file for each.

    Args:
      origin: returns what goes into every file beside the result: command, date, device, versions.
      say: prints a line.
      methods: run only the cells of these; None means all.
      replace: run finished cells again if their settings have changed.
      time_limit: seconds after which no cell may end; None for no limit.

    Raises:
      InputError: a finished cell was made with other settings, and `replace` is not set.
      Preempted: a signal stopped a cell's training.
    """
    end = None if time_limit is None else time.monotonic() + time_limit
    directory = opened.study.directory
    jobs = opened.jobs()
    if not replace:
        check_unchanged([job for job in jobs if methods is None or job.cell.method in methods])
    failed: dict[Cell, Job] = {}
    for job in jobs:
        # Cells that cannot run are reported before hours of work on others.
        is_mine = methods is None or job.cell.method in methods
        if is_mine and job.state != "done" and (reason := opened.refusal(job)) is not None:
            failed[job.cell] = _failed(directory, job, InputError(reason), origin, say)
    while True:
        jobs = opened.jobs()
        mine = [job for job in jobs if methods is None or job.cell.method in methods]
        if not replace:  # what tuning has just chosen may differ from what finished cells were made with
            check_unchanged(mine)
        remaining = [job for job in mine if job.state not in ("done", "waiting") and job.cell not in failed]
        if not remaining:
            break
        job = remaining[0]
        expected = opened.seconds(job, jobs)
        if end is not None and expected is not None and time.monotonic() + expected > end:
            return Outcome(_done(mine), len(mine), list(failed.values()), False)
        began = time.monotonic()
        try:
            record = {**opened.run(job), **origin()}
        except Diverged as error:
            if job.cell.tried is None:
                failed[job.cell] = _failed(directory, job, error, origin, say)
                continue
            # A learning rate at which training diverges is a result: it is not chosen.
            cell = job.cell
            about = {"method": cell.method, "data": cell.data, "seed": cell.seed, "tuned": dict(job.tuned)}
            record = {**about, "settings": job.settings, "diverged": one_line(error), "values": [], **origin()}
            record["seconds"] = {"training": time.monotonic() - began}
        except Exception as error:  # whatever a cell fails with, the others go on
            failed[job.cell] = _failed(directory, job, error, origin, say)
            continue
        finally:
            gc.collect()  # frees the arrays of a cell that failed, too
        path = directory / f"{job.cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        (directory / f"{job.cell.name}.failed.json").unlink(missing_ok=True)
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["seconds"].items())
        say(f"{job.cell.label}: {parts} ({_done(mine) + 1} of {len(mine)} cells)")
    stuck = [
        dataclasses.replace(job, state="failed", note="no settings could be chosen, because no tuning run succeeded")
        if all(other.state == "done" for other in mine if other.cell.tried and other.cell.method == job.cell.method)
        else dataclasses.replace(job, state="failed", note="it waits for tuning runs that failed")
        for job in mine
        if job.state == "waiting" and job.cell not in failed
    ]
    return Outcome(_done(mine), len(mine), [*failed.values(), *stuck], True)


def _done(jobs: Sequence[Job]) -> int:
    return sum(job.state == "done" for job in jobs)


def _failed(
    directory: Path,
    job: Job,
    error: BaseException,
    origin: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None],
) -> Job:
    """Writes why a cell failed; returns it with the reason."""
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    path = directory / f"{job.cell.name}.failed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"method": job.cell.method, "data": job.cell.data, "reason": reason, **origin()})
    say(f"{job.cell.label}: failed: {reason}")
    return dataclasses.replace(job, state="failed", note=reason)


def check_unchanged(jobs: Sequence[Job]) -> None:
    """Refuses finished cells that were made with other settings."""
    changed = [job for job in jobs if job.state == "changed"]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise InputError(
            f"{changed[0].cell.label}{others} was made with other settings ({changed[0].note}); --replace runs such "
            "cells again, or name another output"
        )


def chosen(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Returns the settings with the lowest loss of each method whose tuning cells are all finished."""
    found = {}
    for method in dict.fromkeys(job.cell.method for job in jobs):
        own = [job for job in jobs if job.cell.method == method]
        losses = [tuning_loss(job.record) if job.state == "done" and job.record else None for job in own]
        finite = [loss for loss in losses if loss is not None and loss < np.inf]
        if None in losses or not finite:
            continue
        found[method] = dict(own[losses.index(min(finite))].cell.tried or ())
    return found


def tuning_loss(record: Mapping[str, Any]) -> float:
    """Returns the mean loss over the whole trained window; infinity if training diverged."""
    if "diverged" in record:
        return float("inf")
    return float(np.mean(record["values"][0]["values"]))


def total_seconds(record: Mapping[str, Any]) -> float:
    """Returns the time of a finished cell."""
    return float(sum(record["seconds"].values()))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists the settings that differ, each with both values."""
    flat_before, flat_now = dict(_leaves(before)), dict(_leaves(now))
    keys = dict.fromkeys([*flat_before, *flat_now])
    return [
        f"{key} {flat_before.get(key)} is now {flat_now.get(key)}"
        for key in keys
        if flat_before.get(key) != flat_now.get(key)
    ]


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in items:
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value)):
            yield from _leaves(value, path)
        else:
            yield path, value


def _stage_settings(config: TrainConfig, trains: bool) -> dict[str, Any]:
    """Returns the values that decide what a stage computes; without training, those of the model alone."""
    values = lasting_values(config)
    values.pop("output")
    if not trains:
        return {
            key: value for key, value in values.items() if key.split(".")[0] in ("rope", "model", "window", "compute")
        }
    return {**values, "dataset": _dataset_digest(config.data.directory)}


@functools.lru_cache(maxsize=64)
def _model_digest(path: str | None) -> str | None:
    return None if path is None else model_digest(open_leaves(path))


@functools.lru_cache(maxsize=64)
def _dataset_digest(directory: str) -> str:
    return hashlib.sha256(json.dumps(read_metadata(directory), sort_keys=True).encode()).hexdigest()[:16]


def _documents_digest(names: Sequence[str], documents: Int[np.ndarray, "documents T"]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode() + documents.tobytes()).hexdigest()[:16]


def read_documents(
    wanted: Documents, key: str, length: int, seen: set[str]
) -> tuple[list[str], Int[np.ndarray, "documents T"]]:
    """Reads documents, without those of conversations that were already used.

    Args:
      key: the study's key, for messages.
      length: tokens to cut each document to.
      seen: ids of conversations.

    Returns:
      The documents' ids, and int32 [documents, length].
    Raises:
      InputError: the dataset does not exist, has too few documents, or one shorter than `length`.
    """
    records = Records(wanted.directory, wanted.split)
    fresh = (records[number] for number in range(len(records)))
    fresh = (record for record in fresh if _conversation(record["id"]) not in seen)
    end = None if wanted.count is None else wanted.first + wanted.count
    found = list(itertools.islice(fresh, wanted.first, end))
    if not found or (wanted.count is not None and len(found) < wanted.count):
        raise InputError(
            f"study key '{key}': {len(found)} documents are left in split {wanted.split!r} of {wanted.directory} from "
            f"number {wanted.first} on, without those of conversations used in training or tuning; "
            f"{wanted.count or 1} are needed"
        )
    for record in found:
        if len(record["tokens"]) < length:
            raise InputError(
                f"study key '{key}': document {record['id']} in split {wanted.split!r} of {wanted.directory} has "
                f"{len(record['tokens'])} tokens; {length} are needed"
            )
    return [record["id"] for record in found], np.stack([record["tokens"][:length] for record in found])


def _conversation(identifier: str) -> str:
    """Returns the id of the conversation that a record was cut from; see `eabf prepare`."""
    return identifier.rpartition("#")[0] or identifier


@functools.lru_cache(maxsize=64)
def _conversations(directory: str, split: str, samples: int | None) -> set[str]:
    records = Records(directory, split)
    return {_conversation(records[number]["id"]) for number in range(len(records))[:samples]}


def _without_seed(config: TrainConfig) -> str:
    """Returns a configuration as text, equal for all seeds, as a key of the cache of plans."""
    recipe = dataclasses.replace(config.recipe, seed=0)
    return dump_config(dataclasses.replace(config, recipe=recipe))


@functools.lru_cache(maxsize=1024)
def _settled(text: str) -> tuple[Plan, int]:
    found = settle(configure(None, parse_yaml(text, "the configuration")))
    return found.planned, found.steps


def _metrics(run: Path) -> dict[str, Any]:
    """Returns steps, seconds and losses of a finished run."""
    path = run / METRICS_FILE
    lines = [parse_json(line, path) for line in read_text(path).splitlines()]
    with reading(path, "not the metrics of a run"):
        return {
            "steps": len(lines),
            "seconds": sum(line["seconds"] for line in lines),
            "compile_seconds": lines[0]["compile_seconds"],
            "losses": [float(line["loss"]) for line in lines],
        }
