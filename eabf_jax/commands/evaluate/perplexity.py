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
from jaxtyping import Bool, Int

from eabf_jax.commands import evaluate
from eabf_jax.commands.evaluate import measured_on, model_of, numbers
from eabf_jax.console import Grid, progress_bar, track
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.evaluation.intervals import Mean, finite, student
from eabf_jax.evaluation.key_tokens import (
    ALPHA,
    BETA,
    KeyTokenLoss,
    check_short_context,
    key_token_losses,
    key_token_means,
    key_tokens,
    student_of_some,
)
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
from eabf_jax.interop.loading import Entry
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
    add(
        "--key-tokens",
        metavar="LABEL",
        help="measure the loss on key tokens, which the model LABEL predicts much better from the whole document than "
        "from the tokens right before (LongPPL, arXiv 2410.23771)",
    )
    add("--short-context", type=int, default=1024, help="least tokens right before a token (default: 1024)")
    add("--short-stride", type=int, default=256, help="tokens that share such a context's beginning (default: 256)")
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


class KeyTokens(NamedTuple):
    """Losses on key tokens, by label."""

    evaluator: str  # label of the model that they are key for
    short_context: int  # tokens
    short_stride: int  # tokens
    losses: dict[str, list[KeyTokenLoss]]  # by band, and of all bands if there are several
    beside_first: dict[str, list[Mean]]  # the same, minus the first model's, paired by document


class Comparison(NamedTuple):
    """The result of `compare` by label: bands of one pass, or sliding windows."""

    bands: dict[str, list[BandLoss]]
    curves: dict[str, list[BandLoss]]  # the same pass in bands fine enough for a picture
    windows: dict[str, list[WindowPerplexity]]
    beside_first: dict[str, list[Mean]]  # by band or window: loss minus the first model's, paired by document
    documents: int
    length: int
    pretrained_window: int  # smallest window of the models compared: where extension begins
    key_tokens: KeyTokens | None = None  # of the same pass and bands


def compare(arguments: argparse.Namespace) -> Comparison:
    """Measures every model on the same documents: means by band, or perplexities by window."""
    entries = evaluate.begin(arguments, ("length", "documents", "stride", "short_context", "short_stride"))
    if arguments.windows and arguments.bands:
        raise InputError("--bands and --windows are different measurements: give one of the two")
    if arguments.windows and arguments.key_tokens is not None:
        raise InputError("--key-tokens and --windows are different measurements: give one of the two")
    labels = [entry.label for entry in entries]
    if arguments.key_tokens not in (None, *labels):
        raise unknown_name("--key-tokens", arguments.key_tokens, labels)
    configs = [entry.config for entry in entries]
    documents = evaluate.documents_of(arguments, entries)
    length = documents.shape[1]
    short_window = arguments.short_context + arguments.short_stride
    edges = default_edges(length)
    if arguments.key_tokens is not None:
        _check_evaluator(next(entry for entry in entries if entry.label == arguments.key_tokens), length)
        check_short_context(arguments.short_context, arguments.short_stride, length)
        # No token before has more context than the short one.
        edges = [short_window, *(edge for edge in edges if edge > short_window)]
    if arguments.bands is not None:
        edges = numbers("--bands", arguments.bands, "positions such as 0,256,512,1024")
    check_edges(edges, length)
    windows = [] if arguments.windows is None else numbers("--windows", arguments.windows, "lengths such as 4096,8192")
    for window in windows:
        check_window(window, arguments.stride, length)
    pretrained = min(config.max_position_embeddings for config in configs)
    comparison = Comparison({}, {}, {}, {}, len(documents), length, pretrained)
    losses: dict[str, list[np.ndarray]] = {}
    keys = None
    with progress_bar() as progress:
        # The model that finds the key tokens comes first, because there may be none.
        for entry in sorted(entries, key=lambda entry: entry.label != arguments.key_tokens):
            steps = [(window, arguments.stride) for window in windows] or [(length, 1)]
            if entry.label == arguments.key_tokens:
                steps.append((short_window, arguments.short_stride))
            rows = [len(documents) * len(window_ends(length, *step)) for step in steps]
            advance = track(progress, f"evaluating {entry.label}", sum(rows))
            found = _losses(model_of(entry, arguments), documents, steps, rows, arguments.batch_size, advance)
            if not all(np.isfinite(part).all() for part in found):
                raise InputError(f"{entry.label}: the loss is not finite; check the weights, or use --dtype float32")
            losses[entry.label] = found
            if entry.label == arguments.key_tokens:
                long, short = found
                keys = key_tokens(long, short, short_window)
                _check_keys(keys, edges, arguments)
    means: dict[str, list[np.ndarray]] = {}
    for label in labels:
        if windows:
            comparison.windows[label] = [
                window_perplexity(part, window, arguments.stride)
                for part, window in zip(losses[label], windows, strict=True)
            ]
            means[label] = [part.astype(np.float64).mean(axis=1) for part in losses[label]]
        else:
            comparison.bands[label] = band_losses(losses[label][0], edges)
            comparison.curves[label] = band_losses(losses[label][0], _fine_edges(length))
            means[label] = list(band_means(losses[label][0], edges).values())
        comparison.beside_first[label] = [
            student(mine - theirs) for mine, theirs in zip(means[label], means[labels[0]], strict=True)
        ]
    if keys is None:
        return comparison
    passes = {label: losses[label][0] for label in labels}
    return comparison._replace(key_tokens=_on_key_tokens(passes, keys, edges, arguments))


def _check_evaluator(entry: Entry, length: int) -> None:
    """Refuses a model that cannot read whole documents; a scheme on the command line is taken to extend its window."""
    window = entry.config.max_position_embeddings
    if entry.rope is None and window < length:
        raise InputError(
            f"--key-tokens {entry.label}: its window is {window} tokens, and the documents have {length}; a model that "
            "reads them whole is needed, or --length"
        )


def _check_keys(
    keys: Bool[np.ndarray, "documents T_minus_1"], edges: Sequence[int], arguments: argparse.Namespace
) -> None:
    if not keys[:, max(edges[0] - 1, 0) : edges[-1] - 1].any():
        raise InputError(
            f"no key token found: the whole document makes none likelier for {arguments.key_tokens} by {ALPHA:g} nats "
            f"than the {arguments.short_context} tokens before; try a smaller --short-context, more documents or "
            "another model in --key-tokens"
        )


def _on_key_tokens(
    losses: Mapping[str, np.ndarray],
    keys: Bool[np.ndarray, "documents T_minus_1"],
    edges: Sequence[int],
    arguments: argparse.Namespace,
) -> KeyTokens:
    """Computes every model's losses on key tokens from those of one pass."""
    means = {label: list(key_token_means(part, keys, edges).values()) for label, part in losses.items()}
    first = next(iter(means.values()))
    return KeyTokens(
        arguments.key_tokens,
        arguments.short_context,
        arguments.short_stride,
        {label: key_token_losses(part, keys, edges) for label, part in losses.items()},
        {
            label: [student_of_some(mine - theirs) for mine, theirs in zip(row, first, strict=True)]
            for label, row in means.items()
        },
    )


def _losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    steps: Sequence[tuple[int, int]],
    rows: Sequence[int],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[np.ndarray]:
    """Returns the loss of every token for each window and stride; a window as long as the documents is one pass."""
    found = []
    for (window, stride), before in zip(steps, itertools.accumulate(rows, initial=0), strict=False):
        further = functools.partial(lambda before, done: advance(before + done), before)
        if window == documents.shape[1]:
            found.append(position_losses(model, documents, batch_size=batch_size, progress=further))
        else:
            found.append(sliding_losses(model, documents, window, stride, batch_size=batch_size, progress=further))
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
    elif comparison.key_tokens is not None:
        keys = comparison.key_tokens
        title = f"loss on key tokens of {keys.evaluator}, nats per token, {documents}"
        heads = [f"{part.start:,}-{part.end:,}" for part in next(iter(keys.losses.values()))]
        rows = {label: [(part.mean, "") for part in row] for label, row in keys.losses.items()}
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
        grid.add([label], ("–" if cell == "nan" else cell for cell in cells))  # a band without key tokens
    if comparison.key_tokens is not None:
        counts = next(iter(comparison.key_tokens.losses.values()))
        grid.add_section()
        grid.add(["key tokens (documents)"], (f"{part.tokens:,} ({part.documents:,})" for part in counts))
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
        "beside_first": _as_values(comparison.beside_first),
        **({} if (keys := comparison.key_tokens) is None else {"key_tokens": _key_figures(keys)}),
    }


def _key_figures(keys: KeyTokens) -> dict[str, Any]:
    return {
        **keys._asdict(),
        "alpha": ALPHA,
        "beta": BETA,
        "losses": {label: [finite(dataclasses.asdict(part)) for part in row] for label, row in keys.losses.items()},
        "beside_first": _as_values(keys.beside_first),
    }


def _as_values(means: Mapping[str, Sequence[Mean]]) -> dict[str, Any]:
    return {label: [finite(mean._asdict()) for mean in row] for label, row in means.items()}


def read(report: Mapping[str, Any]) -> Comparison:
    """Restores the comparison from a report of `as_json`."""

    def rows(key: str, kind: Callable[..., Any], source: Mapping[str, Any] = report) -> dict[str, list[Any]]:
        # JSON has no NaN.
        return {
            label: [kind(**{name: math.nan if x is None else x for name, x in part.items()}) for part in parts]
            for label, parts in source.get(key, {}).items()
        }

    windows, bands = rows("windows", WindowPerplexity), rows("bands", BandLoss)
    if not (windows or bands):
        raise KeyError("bands")
    sizes = [report[name] for name in ("documents", "length", "pretrained_window")]
    comparison = Comparison(bands, rows("curves", BandLoss), windows, rows("beside_first", Mean), *sizes)
    if (keys := report.get("key_tokens")) is None:
        return comparison
    found = KeyTokens(
        keys["evaluator"],
        keys["short_context"],
        keys["short_stride"],
        rows("losses", KeyTokenLoss, keys),
        rows("beside_first", Mean, keys),
    )
    return comparison._replace(key_tokens=found)


def draw(comparison: Comparison, path: Path) -> None:
    """Draws the comparison; the path's suffix (.png, .svg, .pdf) sets the format."""
    from eabf_jax.analysis.figures import loss_by_position, perplexity_by_window

    documents = f"{comparison.documents} documents"
    if comparison.windows:
        perplexity_by_window(comparison.windows, path, title=f"perplexity by window, {documents}")
    elif comparison.key_tokens is not None:
        found = comparison.key_tokens.losses
        bands = {label: [part for part in row[: max(1, len(row) - 1)] if part.tokens] for label, row in found.items()}
        title = f"loss on key tokens by position, {documents}"
        loss_by_position(bands, path, pretrained_window=comparison.pretrained_window, title=title)
    else:
        window, title = comparison.pretrained_window, f"loss by position, {documents}"
        # Older reports have no curves and are drawn from their bands.
        loss_by_position(comparison.curves or comparison.bands, path, pretrained_window=window, title=title)
