"""`eabf evaluate perplexity`: models and schemes side by side, as a table, JSON and a picture."""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eabf_jax.commands import evaluate
from eabf_jax.commands.evaluate import measured_on, model_of, numbers
from eabf_jax.console import Grid, progress_bar, track
from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Mean, finite, student
from eabf_jax.evaluation.perplexity import (
    BandLoss,
    WindowPerplexity,
    band_losses,
    band_means,
    check_edges,
    check_window,
    position_losses,
    sliding_losses,
    window_ends,
    window_perplexity,
)
from eabf_jax.model.llama import Llama


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    evaluate.add_arguments(parser)
    evaluate.add_document_arguments(parser)
    add = parser.add_argument
    add("--bands", help="edges of the position bands, e.g. 0,256,512,1024 (default: doubling from 256 to the length)")
    add(
        "--windows",
        help="measure perplexity in sliding windows of these lengths in tokens instead of bands, e.g. 4096,8192",
    )
    add("--stride", type=int, default=256, help="new tokens of each sliding window (default: 256)")
    add("--figure", help="draw loss by position, or perplexity by window, here (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Compares the models; prints and writes the result."""
    found = compare(arguments)
    evaluate.report(arguments, table(found), as_json(found, arguments), functools.partial(draw, found))


def default_edges(length: int) -> list[int]:
    """Returns the band edges 0, 256, 512, ..., doubling up to the length."""
    edges = [0]
    while (following := max(256, edges[-1] * 2)) < length:
        edges.append(following)
    return [*edges, length]


class Comparison(NamedTuple):
    """The result of `compare` by label: bands of one pass, or sliding windows."""

    bands: dict[str, list[BandLoss]]
    curves: dict[str, list[BandLoss]]  # the same pass in bands fine enough for a picture
    windows: dict[str, list[WindowPerplexity]]
    beside_first: dict[str, list[Mean]]  # by band or window: loss minus the first model's, paired by document
    documents: int
    length: int
    pretrained_window: int  # smallest window of the models compared: where extension begins


def compare(arguments: argparse.Namespace) -> Comparison:
    """Measures every model on the same documents: means by band, or perplexities by window."""
    entries = evaluate.begin(arguments, ("length", "documents", "stride"))
    if arguments.windows and arguments.bands:
        raise InputError("--bands and --windows are different measurements: give one of the two")
    configs = [entry.config for entry in entries]
    documents = evaluate.documents_of(arguments, entries)
    edges = default_edges(documents.shape[1])
    if arguments.bands is not None:
        edges = numbers("--bands", arguments.bands, "positions such as 0,256,512,1024")
    check_edges(edges, documents.shape[1])
    windows = [] if arguments.windows is None else numbers("--windows", arguments.windows, "lengths such as 4096,8192")
    for window in windows:
        check_window(window, arguments.stride, documents.shape[1])
    # The rows of each pass: the documents, or the windows that slide over them.
    ends = [window_ends(documents.shape[1], window, arguments.stride) for window in windows]
    rows = [len(documents) * len(pass_ends) for pass_ends in ends] or [len(documents)]
    pretrained = min(config.max_position_embeddings for config in configs)
    comparison = Comparison({}, {}, {}, {}, len(documents), documents.shape[1], pretrained)
    means: dict[str, list[np.ndarray]] = {}
    with progress_bar() as progress:
        for entry in entries:
            advance = track(progress, f"evaluating {entry.label}", sum(rows))
            # No variable holds the model, so it is freed before the next one is loaded.
            losses = _losses(model_of(entry, arguments), documents, windows, rows, arguments, advance)
            if not all(np.isfinite(part).all() for part in losses):
                raise InputError(f"{entry.label}: the loss is not finite; check the weights, or use --dtype float32")
            if windows:
                comparison.windows[entry.label] = [
                    window_perplexity(part, window, arguments.stride)
                    for part, window in zip(losses, windows, strict=True)
                ]
                means[entry.label] = [part.astype(np.float64).mean(axis=1) for part in losses]
            else:
                comparison.bands[entry.label] = band_losses(losses[0], edges)
                comparison.curves[entry.label] = band_losses(losses[0], _fine_edges(documents.shape[1]))
                means[entry.label] = list(band_means(losses[0], edges).values())
            first = means[entries[0].label]
            comparison.beside_first[entry.label] = [
                student(mine - theirs) for mine, theirs in zip(means[entry.label], first, strict=True)
            ]
    return comparison


def _losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    windows: Sequence[int],
    rows: Sequence[int],
    arguments: argparse.Namespace,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
    """Returns the loss of every token: of one pass, or for each window length."""
    size, stride = arguments.batch_size, arguments.stride
    if not windows:
        return [position_losses(model, documents, batch_size=size, progress=advance)]
    found = []
    for window, before in zip(windows, itertools.accumulate(rows, initial=0), strict=False):
        further = functools.partial(lambda before, done: advance(before + done), before)
        found.append(sliding_losses(model, documents, window, stride, batch_size=size, progress=further))
    return found


def _fine_edges(length: int) -> list[int]:
    """Returns the edges of 32 bands, or of one per position if there are fewer; position 0 has no loss."""
    edges: list[int] = np.linspace(1, length, min(32, length - 1) + 1).round().astype(int).tolist()
    return edges


def table(comparison: Comparison) -> Grid:
    """Lays out the comparison: one row per model, one column per band or window, the best value in bold."""
    documents = f"{comparison.documents} documents of {comparison.length:,} tokens"
    if comparison.windows:
        first = next(iter(comparison.windows.values()))
        title = f"perplexity by window, stride {first[0].stride:,}, {documents} (95 % interval over documents)"
        heads = [f"{column.window:,}" for column in first]
        rows = {
            label: [(w.perplexity, "" if math.isnan(w.low) else f" ({w.low:.2f}–{w.high:.2f})") for w in row]
            for label, row in comparison.windows.items()
        }
    else:
        title = f"loss by position, nats per token, {documents}"
        heads = [f"{band.start:,}-{band.end:,}" for band in next(iter(comparison.bands.values()))]
        rows = {label: [(band.mean, "") for band in row] for label, row in comparison.bands.items()}
    grid = Grid(["model"], heads, title=title)
    best = [min(value for value, _ in column) for column in zip(*rows.values(), strict=True)]
    for label, row in rows.items():
        cells = (
            f"[bold]{value:.3f}[/bold]{note}" if value == low else f"{value:.3f}{note}"
            for (value, note), low in zip(row, best, strict=True)
        )
        grid.add([label], cells)
    return grid


def as_json(comparison: Comparison, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the comparison as JSON values, with the settings of the measurement."""
    return {"dtype": arguments.dtype, "models": list(arguments.model), **measured_on(), **figures(comparison)}


def figures(comparison: Comparison) -> dict[str, Any]:
    """Returns the losses or perplexities as JSON values by label."""
    return {
        "documents": comparison.documents,
        "length": comparison.length,
        "pretrained_window": comparison.pretrained_window,
        "unit": "nats per token",
        "half_width": "of the 95 % confidence interval over documents (Student's t)",
        **{
            kind: {label: [finite(dataclasses.asdict(part)) for part in parts] for label, parts in measured.items()}
            for kind in ("windows", "bands", "curves")
            if (measured := getattr(comparison, kind))
        },
        "beside_first": {
            label: [finite(mean._asdict()) for mean in means] for label, means in comparison.beside_first.items()
        },
    }


def read(report: Mapping[str, Any]) -> Comparison:
    """Restores the comparison from a report of `as_json`."""

    def rows(key: str, kind: Callable[..., Any]) -> dict[str, list[Any]]:
        # JSON has no NaN.
        return {
            label: [kind(**{name: math.nan if x is None else x for name, x in part.items()}) for part in parts]
            for label, parts in report.get(key, {}).items()
        }

    windows, bands = rows("windows", WindowPerplexity), rows("bands", BandLoss)
    if not (windows or bands):
        raise KeyError("bands")
    sizes = [report[name] for name in ("documents", "length", "pretrained_window")]
    return Comparison(bands, rows("curves", BandLoss), windows, rows("beside_first", Mean), *sizes)


def draw(comparison: Comparison, path: Path) -> None:
    """Draws the comparison; the path's suffix (.png, .svg, .pdf) sets the format."""
    from eabf_jax.analysis.figures import loss_by_position, perplexity_by_window

    documents = f"{comparison.documents} documents"
    if comparison.windows:
        perplexity_by_window(comparison.windows, path, title=f"perplexity by window, {documents}")
    else:
        window, title = comparison.pretrained_window, f"loss by position, {documents}"
        # Older reports have no curves and are drawn from their bands.
        loss_by_position(comparison.curves or comparison.bands, path, pretrained_window=window, title=title)
