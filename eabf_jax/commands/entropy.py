"""`eabf entropy`: attention entropy of models and schemes side by side, as a table, JSON, CSV and a picture."""

import argparse
import csv
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eabf_jax.analysis.attention_entropy import Entropies, by_head, by_layer, drift, entropies, sides
from eabf_jax.commands import evaluate
from eabf_jax.commands.evaluate import measured_on, model_of, numbers
from eabf_jax.console import Grid, progress_bar, track
from eabf_jax.destination import whole
from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Mean, finite
from eabf_jax.evaluation.perplexity import check_edges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    evaluate.add_arguments(parser)
    evaluate.add_document_arguments(parser)
    add = parser.add_argument
    add("--bands", help="edges of the position bands, e.g. 0,256,512,1024 (default: two for each doubling from 16)")
    add("--window", type=int, help="pretrained window in tokens (default: the smallest window of the models)")
    add("--csv", help="write one line for each model, layer, head and band to this file")
    add("--figure", help="draw curves, heat maps and the spread of heads here (.png, .svg or .pdf)")


class Comparison(NamedTuple):
    """The result of `compare`."""

    found: dict[str, Entropies]  # by label
    documents: int
    length: int
    window: int  # the pretrained window

    def drifts(self, label: str) -> list[Mean]:
        """Returns a model's change of entropy beyond the window by layer; empty without bands on both sides of it."""
        found = self.found[label]
        return drift(found, self.window) if all(side.any() for side in sides(found.edges, self.window)) else []


def run(arguments: argparse.Namespace) -> None:
    """Measures the models; prints and writes the result."""
    made = compare(arguments)
    if arguments.csv:
        write_csv(made, Path(arguments.csv))
        print(f"table of all heads: {arguments.csv}")
    figures = {"dtype": arguments.dtype, "models": list(arguments.model), **measured_on(), **as_json(made)}
    evaluate.report(arguments, table(made), figures, functools.partial(draw, made))


def default_edges(length: int, window: int) -> list[int]:
    """Returns band edges: two for each doubling from 16 tokens, the window, half of it, and the length."""
    steps = [round(16 * 2 ** (step / 2)) for step in range(2 * length.bit_length())]
    return sorted({0, length, *(edge for edge in (*steps, window // 2, window) if 0 < edge < length)})


def compare(arguments: argparse.Namespace) -> Comparison:
    """Measures every model on the same documents.

    Raises:
      InputError: as for `evaluate.begin`, `evaluate.documents_of` and `entropies`; bands that do not fit.
    """
    entries = evaluate.begin(arguments, ("length", "documents"))
    if arguments.window is not None and arguments.window < 2:
        raise InputError(f"--window {arguments.window}: at least 2 tokens are needed")
    documents = evaluate.documents_of(arguments, entries)
    length = documents.shape[1]
    window = arguments.window or min(entry.config.max_position_embeddings for entry in entries)
    edges = default_edges(length, window)
    if arguments.bands is not None:
        edges = numbers("--bands", arguments.bands, "positions such as 0,256,512,1024")
    check_edges(edges, length)
    if arguments.window is not None and not all(side.any() for side in sides(edges, window)):
        raise InputError(
            f"--window {window}: no band of {','.join(map(str, edges))} lies beyond it, or none in its last half"
        )
    made = Comparison({}, len(documents), length, window)
    with progress_bar() as progress:
        for entry in entries:
            advance = track(progress, f"measuring {entry.label}", len(documents))
            try:
                size = arguments.batch_size
                found = entropies(model_of(entry, arguments), documents, edges, batch_size=size, progress=advance)
            except InputError as error:
                raise InputError(f"{entry.label}: {error}") from error
            made.found[entry.label] = found
    return made


def table(made: Comparison) -> Grid:
    """Lays out by layer the change of entropy beyond the window, or for shorter documents the last band's entropy."""
    labels = list(made.found)
    about = f"{made.documents} documents of {made.length:,} tokens"
    columns = [made.drifts(label) for label in labels]
    if all(columns):
        title = (
            f"attention entropy beyond {made.window:,} tokens minus that at {made.window // 2:,}-{made.window:,}, "
            f"nats, mean over heads, {about}"
        )
    else:
        start, end = made.found[labels[0]].edges[-2:]
        title = f"attention entropy at {start:,}-{end:,}, nats, mean over heads, {about}"
        columns = [[row[-1] for row in by_layer(made.found[label])] for label in labels]
    grid = Grid(["layer"], labels, title=title)
    for layer in range(max(map(len, columns))):
        cells = (shown(column[layer]) if layer < len(column) else "" for column in columns)
        grid.add([str(layer)], cells)
    return grid


def shown(mean: Mean) -> str:
    """Formats a mean with its interval, which one document does not have."""
    note = "" if mean.half_width != mean.half_width else f" ± {mean.half_width:.3f}"
    return f"{mean.mean:.3f}{note}"


def as_json(made: Comparison) -> dict[str, Any]:
    """Returns the entropies as JSON values by label."""

    def values(means: Sequence[Mean]) -> list[dict[str, Any]]:
        return [finite(mean._asdict()) for mean in means]

    labels = made.found
    return {
        "documents": made.documents,
        "length": made.length,
        "pretrained_window": made.window,
        "unit": "nats",
        "half_width": "of the 95 % confidence interval over documents (Student's t)",
        "edges": next(iter(labels.values())).edges,
        "uniform": next(iter(labels.values())).uniform.tolist(),
        "drift": {label: values(made.drifts(label)) for label in labels},
        "layers": {label: [values(bands) for bands in by_layer(found)] for label, found in labels.items()},
        "heads": {
            label: [[values(bands) for bands in heads] for heads in by_head(found)] for label, found in labels.items()
        },
    }


def write_csv(made: Comparison, path: Path) -> None:
    """Writes one line for each model, layer, head and band."""
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["model", "layer", "head", "start", "end", "mean", "half_width", "documents"])
        for label, found in made.found.items():
            for layer, heads in enumerate(by_head(found)):
                for head, bands in enumerate(heads):
                    for (start, end), mean in zip(itertools.pairwise(found.edges), bands, strict=True):
                        lines.writerow([label, layer, head, start, end, *mean, made.documents])


def draw(made: Comparison, path: Path) -> None:
    """Draws the comparison; the path's suffix (.png, .svg, .pdf) sets the format."""
    from eabf_jax.analysis.figures import entropy_maps

    title = f"attention entropy, {made.documents} documents"
    means: Mapping[str, Entropies] = made.found
    entropy_maps(means, path, pretrained_window=made.window, title=title)
