"""`eabf study`: methods x data x seeds, trained and measured cell by cell, as tables, pictures and a page."""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape

from eabf_jax.analysis.study import Study, load_study
from eabf_jax.analysis.study_report import (
    Results,
    as_json,
    claims_table,
    read_results,
    tables,
    tuning_table,
    verdicts,
    write_report,
)
from eabf_jax.analysis.study_run import Job, Opened
from eabf_jax.analysis.study_run import run as run_cells
from eabf_jax.commands.evaluate import measured_on
from eabf_jax.commands.options import write_figures
from eabf_jax.console import Grid, show
from eabf_jax.destination import check_destination, whole
from eabf_jax.errors import CAN_CONTINUE, InputError, Stopped, unknown_name
from eabf_jax.parallel.mesh import gpu_defaults, use_every_core
from eabf_jax.training.lock import LOCK_FILE, locked
from eabf_jax.training.recipe import configure

# Exit statuses.
TIME_IS_UP, CELLS_FAILED = CAN_CONTINUE, 4
# Programs that cells share, in the study's directory.
_COMPILED = "compiled"
# The study's file as it was when it started last, which marks its directory.
_COPY = "study.yaml"

EPILOG = """\
Exit status: 0 if every cell is finished, 2 for bad input, 3 if --time-limit or SIGTERM left cells
undone, 4 if cells failed.
The same command continues: it repeats no finished cell, and tries failed ones again.
docs/studies.md describes the file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("file", metavar="FILE.yaml", help="the study; configs/studies has examples")
    add("--dry-run", action="store_true", help="check every cell, and print the cells with state and predicted time")
    add("--report-only", action="store_true", help="make tables, pictures and page from the finished cells")
    add("--only", metavar="METHOD,...", help="run the cells of these methods only")
    add("--time-limit", type=float, metavar="SECONDS", help="start no cell that would end later than this")
    add("--replace", action="store_true", help="run finished cells again whose settings have changed")
    add("--json", help="write tables, tests and verdicts to this file")


def run(arguments: argparse.Namespace) -> None:
    """Runs the cells that are not finished, and reports."""
    began = time.monotonic()
    study = load_study(arguments.file)
    methods = None if arguments.only is None else arguments.only.split(",")
    for method in methods or ():
        if method not in study.methods:
            raise unknown_name("method in --only", method, study.methods)
    if arguments.time_limit is not None and arguments.time_limit <= 0:
        raise InputError(f"--time-limit {arguments.time_limit:g}: a positive number of seconds is needed")
    if arguments.report_only:
        report(read_results(study), arguments, every_table=True)
        return
    config = configure(study.config, {**study.settings, **next(iter(study.methods.values()))})
    use_every_core(config.recipe.batch_size)
    gpu_defaults()
    if arguments.dry_run:
        dry_run(Opened(study), methods, arguments.replace)
        return
    _check_output(study)
    with locked(study.directory):
        with whole(study.directory / _COPY) as partial:
            shutil.copyfile(arguments.file, partial)
        if jax.config.values["jax_compilation_cache_dir"] is None:
            # Cells of a method share programs, and so do those of a later start.
            jax.config.update("jax_compilation_cache_dir", str(study.directory.absolute() / _COMPILED))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        opened = Opened(study)
        spent = time.monotonic() - began
        limit = None if arguments.time_limit is None else arguments.time_limit - spent
        commit = _commit()
        try:
            outcome = run_cells(
                opened,
                lambda: {**measured_on(), "commit": commit},
                lambda line: print(line, flush=True),
                methods=methods,
                replace=arguments.replace,
                time_limit=limit,
            )
        except Stopped as stop:  # the same command continues, whatever the cell was doing
            interrupted = 128 + signal.SIGINT
            raise Stopped(str(stop), interrupted if stop.status == interrupted else CAN_CONTINUE) from stop
        report(read_results(study), arguments, every_table=outcome.done == outcome.cells)
    for job in outcome.failed:
        print(f"failed: {job.cell.label}: {job.note}")
    if not outcome.in_time:
        print(f"time is up with {outcome.done} of {outcome.cells} cells; run the same command to continue")
        sys.exit(TIME_IS_UP)
    if outcome.failed:
        print(f"{len(outcome.failed)} of {outcome.cells} cells failed; run the same command to try them again")
        sys.exit(CELLS_FAILED)


def dry_run(opened: Opened, methods: Sequence[str] | None, replace: bool) -> None:
    """Prints every cell with its state and predicted time; exits with status 4 if a cell cannot run."""
    jobs = opened.jobs()
    grid = Grid(["cell"], ["state", "predicted", "note"], title=f"study {opened.study.output}")
    total, unknown, refused = 0.0, 0, 0
    for job in jobs:
        if methods is not None and job.cell.method not in methods:
            continue
        state, note, seconds = _foreseen(opened, job, jobs)
        if job.state == "changed" and not replace:
            note = f"made with other settings: {job.note}; --replace runs it again"
        refused += state == "cannot run"
        if state not in ("done", "cannot run"):
            total, unknown = total + (seconds or 0.0), unknown + (seconds is None)
        told = "" if job.state == "done" else "unknown" if seconds is None else f"{seconds:,.0f} s"
        grid.add([job.cell.label], [state, told, escape(note)])
    show(grid)
    print(f"predicted: {total:,.0f} s" + (f", and {unknown} cells whose time is unknown" if unknown else ""))
    if refused:
        sys.exit(CELLS_FAILED)


def _foreseen(opened: Opened, job: Job, jobs: Sequence[Job]) -> tuple[str, str, float | None]:
    """Returns a cell's state, a note and its predicted seconds."""
    if job.state == "done":
        return job.state, "", None
    reason = opened.refusal(job)
    if reason is not None:
        return "cannot run", reason, None
    return job.state, job.note, opened.seconds(job, jobs)


def report(results: Results, arguments: argparse.Namespace, *, every_table: bool) -> None:
    """Prints verdicts and tables, and writes the page, the pictures and the figures; the page has every table."""
    if not results.records:
        print("no cell is finished, so there is nothing to report")
        return
    if results.study.claims:
        show(claims_table(verdicts(results)).grid())
    chosen = tuning_table(results)
    for table in [*itertools.chain(*tables(results).values()), *([chosen] if chosen else [])] if every_table else ():
        show(table.grid())
    print(f"page: {write_report(results)}")
    write_figures(arguments, as_json(results))


def _check_output(study: Study) -> None:
    """Refuses an output directory that holds something other than a study, because a study removes files of its own."""
    entries = {entry.name for entry in study.directory.iterdir()} if study.directory.is_dir() else set()
    if entries - {LOCK_FILE} and _COPY not in entries:
        raise InputError(
            f"output {study.output} holds {min(entries)} and no {_COPY}, so it is no study's directory: "
            "name another one"
        )
    if not entries:
        check_destination(study.directory)


def _commit() -> str | None:
    """Returns the checked-out commit of this package, with `-dirty` if files differ; None outside a checkout."""
    told: Any = os.environ.get("EABF_COMMIT")
    if told:
        return str(told)
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
