"""What `eabf evaluate passkey` and `line-retrieval` share: models side by side, as a table, JSON and a picture."""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eabf_jax.commands import evaluate
from eabf_jax.commands.evaluate import measured_on, model_of, numbers, tokenizer_of
from eabf_jax.console import Grid, progress_bar, track
from eabf_jax.data.dataset import tokenizer_digest
from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Share, clustered, finite
from eabf_jax.evaluation.retrieval import Cell, Prompt, measure
from eabf_jax.interop.loading import Entry


class Task(NamedTuple):
    """One kind of retrieval."""

    name: str
    has_depths: bool  # whether its prompts form a grid of lengths and depths
    samples: int  # default number of prompts per cell
    prompts: Callable[..., list[Prompt]]  # takes tokenizer, lengths, depths if it has them, samples, seed and `chat`


def add_arguments(parser: argparse.ArgumentParser, task: Task) -> None:
    """Declares the command line of one task."""
    evaluate.add_arguments(parser)
    add = parser.add_argument
    add(
        "--lengths",
        required=True,
        help="tokens of prompt and answer, e.g. 4096,8192,16384,32768; each prompt is as long as these allow",
    )
    if task.has_depths:
        add("--depths", default="0,25,50,75,100", help="places of the key, percent of the text (default: %(default)s)")
    of = "length and depth" if task.has_depths else "length"
    add("--samples", type=int, default=task.samples, help=f"prompts for each {of} (default: {task.samples})")
    add("--seed", type=int, default=0, help="seed of the prompts, the same for every model (default: 0)")
    add(
        "--no-chat-template",
        dest="chat_template",
        action="store_false",
        help="do not put prompts into the tokenizer's chat template",
    )
    add(
        "--pretrained-window",
        type=int,
        help="lengths up to this many tokens count as short (default: the smallest window of the models compared)",
    )
    kind = "a heat map per model" if task.has_depths else "accuracy by length"
    add("--figure", help=f"draw {kind} here (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace, task: Task) -> None:
    """Compares the models; prints and writes the result."""
    found = compare(arguments, task)
    if found.note:
        print(f"note: {found.note}")
    evaluate.report(arguments, table(found), as_json(found, arguments), functools.partial(draw, found))


class Retrieval(NamedTuple):
    """The result of `compare`."""

    task: str  # its name
    cells: dict[str, list[Cell]]  # by label
    pretrained_window: int  # the longest length that counts as short
    note: str  # how the models' prompts differ; empty if they are the same


def compare(arguments: argparse.Namespace, task: Task) -> Retrieval:
    """Measures every model on the prompts of a seed."""
    entries = evaluate.begin(arguments, ("samples", "pretrained_window"))
    grid = [_ascending("--lengths", arguments.lengths, 1, None)]
    if task.has_depths:
        grid.append(_ascending("--depths", arguments.depths, 0, 100))
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: 0 or a positive number is needed")
    window = min(entry.config.max_position_embeddings for entry in entries)
    by_model, note = _prompts(entries, arguments, task, grid)
    cells: dict[str, list[Cell]] = {}
    with progress_bar() as progress:
        for entry, prompts in zip(entries, by_model, strict=True):
            advance = track(progress, f"{task.name}, {entry.label}", len(prompts))
            # No variable holds the model, so it is freed before the next one is loaded.
            cells[entry.label] = measure(
                model_of(entry, arguments), prompts, batch_size=arguments.batch_size, progress=advance
            )
    return Retrieval(task.name, cells, arguments.pretrained_window or window, note)


def _ascending(option: str, text: str, least: int, most: int | None) -> list[int]:
    found = numbers(option, text, "numbers such as " + ("4096,8192" if most is None else "0,50,100"))
    limits = f"from {least}" if most is None else f"from {least} to {most}"
    if sorted(set(found)) != found or found[0] < least or (most is not None and found[-1] > most):
        raise InputError(f"{option} {text}: ascending numbers {limits} are needed")
    return found


def _prompts(
    entries: Sequence[Entry], arguments: argparse.Namespace, task: Task, grid: Sequence[list[int]]
) -> tuple[list[list[Prompt]], str]:
    """Returns each model's prompts, made once for models that read the same text, and a note on how they differ."""
    made: dict[tuple[str, str | None], list[Prompt]] = {}
    by_model = []
    for entry in entries:
        tokenizer = tokenizer_of(entry.directory)
        key = (tokenizer_digest(tokenizer), tokenizer.chat_template if arguments.chat_template else None)
        if key not in made:
            made[key] = task.prompts(tokenizer, *grid, arguments.samples, arguments.seed, chat=arguments.chat_template)
        by_model.append(made[key])
    if len({digest for digest, _ in made}) > 1:
        return by_model, "the tokenizers differ: the answers are the same, but each model gets as much text as fits"
    if len(made) > 1:
        return by_model, "the chat templates differ: the answers are the same, but each model reads its own template"
    return by_model, ""


def by_length(cells: Sequence[Cell]) -> dict[int, Share]:
    """Returns a model's share of hits by length, ascending, over all depths."""
    return {length: _pooled([cell for cell in cells if cell.length == length]) for length in _lengths(cells)}


def short_and_long(cells: Sequence[Cell], pretrained_window: int) -> dict[str, Share]:
    """Returns a model's share of hits up to the pretrained window ("short") and beyond ("long"), if there are any."""
    sets = {
        "short": [cell for cell in cells if cell.length <= pretrained_window],
        "long": [cell for cell in cells if cell.length > pretrained_window],
    }
    return {name: _pooled(found) for name, found in sets.items() if found}


def _lengths(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.length for cell in cells})


def _pooled(cells: Sequence[Cell]) -> Share:
    return clustered([cluster for cell in cells for cluster in _clusters(cell)])


def _clusters(cell: Cell) -> list[tuple[int, int]]:
    """Returns hits and total of prompts that tend to be answered alike: one depth, or one prompt if it is random."""
    if cell.depth is not None:
        return [(cell.hits, cell.total)]
    return [(1, 1)] * cell.hits + [(0, 1)] * (cell.total - cell.hits)


def table(retrieval: Retrieval) -> Grid:
    """Lays out the result: one row per model, one column per length, and columns for all short and all long lengths."""
    shares = {
        label: [*by_length(cells).values(), *short_and_long(cells, retrieval.pretrained_window).values()]
        for label, cells in retrieval.cells.items()
    }
    cells = next(iter(retrieval.cells.values()))
    bounds = {"short": f"≤ {retrieval.pretrained_window:,}", "long": f"> {retrieval.pretrained_window:,}"}
    groups = [bounds[name] for name in short_and_long(cells, retrieval.pretrained_window)]
    title = f"{retrieval.task}: percent answered by length (95 % interval)"
    grid = Grid(["model"], [*(f"{length:,}" for length in _lengths(cells)), *groups], title=title)
    best = [max(share.hits for share in column) for column in zip(*shares.values(), strict=True)]
    for label, row in shares.items():
        grid.add([label], [_shown(share, most) for share, most in zip(row, best, strict=True)])
    return grid


def _shown(share: Share, most: int) -> str:
    text = f"{100 * share.hits / share.total:.0f}"
    interval = "" if math.isnan(share.low) else f" ({100 * share.low:.0f}–{100 * share.high:.0f})"
    return f"[bold]{text}[/bold]{interval}" if 0 < share.hits == most else text + interval


def as_json(retrieval: Retrieval, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the result as JSON values, with the settings of the measurement."""
    return {
        "task": retrieval.task,
        "seed": arguments.seed,
        "samples": arguments.samples,
        "chat_template": arguments.chat_template,
        "note": retrieval.note,
        "dtype": arguments.dtype,
        "models": list(arguments.model),
        **measured_on(),
        **figures(retrieval),
    }


def figures(retrieval: Retrieval) -> dict[str, Any]:
    """Returns cells, and their sums by length and by short and long, as JSON values by label."""
    window = retrieval.pretrained_window
    return {
        "pretrained_window": window,
        "interval": "95 %, bootstrap over cells of a length and depth; over prompts where depth is left to chance",
        "loss": "of the answers, nats per token",
        "cells": {label: [dataclasses.asdict(cell) for cell in row] for label, row in retrieval.cells.items()},
        "by_length": {
            label: [{"length": length, **finite(share._asdict())} for length, share in by_length(row).items()]
            for label, row in retrieval.cells.items()
        },
        "short_and_long": {
            label: {name: finite(share._asdict()) for name, share in short_and_long(row, window).items()}
            for label, row in retrieval.cells.items()
        },
    }


def read(report: Mapping[str, Any]) -> Retrieval:
    """Restores the result from a report of `as_json`; ignores its sums."""
    names = [field.name for field in dataclasses.fields(Cell)]
    cells = {
        label: [Cell(**{name: cell[name] for name in names}) for cell in row] for label, row in report["cells"].items()
    }
    return Retrieval(report["task"], cells, report["pretrained_window"], report.get("note", ""))


def draw(retrieval: Retrieval, path: Path) -> None:
    """Draws the result; the path's suffix (.png, .svg, .pdf) sets the format."""
    from eabf_jax.analysis.figures import heat_maps, share_by_length

    window, title = retrieval.pretrained_window, retrieval.task
    if any(cell.depth is not None for row in retrieval.cells.values() for cell in row):
        heat_maps(retrieval.cells, path, pretrained_window=window, title=title)
    else:
        shares = {label: by_length(row) for label, row in retrieval.cells.items()}
        share_by_length(shares, path, pretrained_window=window, title=title)
