"""`eabf evaluate perplexity`: models and schemes side by side, as a table, JSON and a picture."""

import argparse
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import yaml
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from eabf_jax.data.dataset import Records
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.evaluation.perplexity import BandLoss, band_losses, position_losses
from eabf_jax.interop.loading import DTYPES, load, read_config
from eabf_jax.rope import Scheme


class Entry(NamedTuple):
    """One line of the table."""

    label: str
    directory: str
    rope: dict[str, Any] | None  # None: the model's own scheme


def parse_entry(text: str) -> Entry:
    """Reads `[LABEL=]DIR[@{type: ..., ...}]`.

    Args:
      text: from the command line.

    Returns:
      The label (the directory where none is given), the directory, and the scheme to use in place of its own.
    Raises:
      InputError: what follows @ is not a mapping.
    """
    model, at, scheme_text = text.partition("@")
    label, equals, directory = model.partition("=")
    rope = None
    if at:
        try:
            rope = yaml.safe_load(scheme_text)
        except yaml.YAMLError:
            rope = None
        if not isinstance(rope, dict) or "type" not in rope:
            raise InputError(f"--model {text!r}: after @ a scheme such as {{type: yarn, factor: 4}} is needed")
    return Entry(label if equals else model, directory if equals else model, rope)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[LABEL=]DIR[@SCHEME]",
        help="a Hugging Face or native directory; after @ a rotary scheme to use instead of its own, as YAML: "
        "'yarn=models/tiny@{type: yarn, factor: 4, pretrained_window: 512}'. Repeat for more lines",
    )
    parser.add_argument("--data", required=True, help="a dataset made by `eabf prepare`")
    parser.add_argument("--split", default="held_out", help="its split (default: held_out)")
    parser.add_argument("--length", type=int, help="cut documents to this many tokens (default: the shortest one's)")
    parser.add_argument("--documents", type=int, help="use the first so many (default: all)")
    parser.add_argument(
        "--bands", help="edges of the position bands, e.g. 0,256,512,1024 (default: doubling from 256 to the length)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="documents that each device reads at a time (default: 1)"
    )
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--figure", help="draw loss by position here (.png, .svg or .pdf)")


def default_edges(length: int) -> list[int]:
    """Band edges 0, 256, 512, ... doubling up to the length."""
    edges = [0]
    while (following := max(256, edges[-1] * 2)) < length:
        edges.append(following)
    return [*edges, length]


class Comparison(NamedTuple):
    """What `compare` measured, by label."""

    losses: dict[str, np.ndarray]  # float32 [documents, length - 1], from `position_losses`
    bands: dict[str, list[BandLoss]]
    documents: int
    length: int
    pretrained_window: int  # smallest window of the models compared: where extension begins


def compare(arguments: argparse.Namespace) -> Comparison:
    """Measures every model on the same documents.

    Args:
      arguments: as declared by `add_arguments`.

    Returns:
      The losses and their means by band.
    Raises:
      InputError: as the loading functions; bands that do not fit; documents that are too short.
    """
    entries = [parse_entry(text) for text in arguments.model]
    # What is wrong is told before hours of work.
    _check(arguments, entries)
    configs = [read_config(entry.directory) for entry in entries]
    documents = read_documents(arguments.data, arguments.split, arguments.length, arguments.documents)
    for entry, config in zip(entries, configs, strict=True):
        if documents.max() >= config.vocab_size:
            raise InputError(
                f"{arguments.data} holds token id {documents.max()}, {entry.directory} has ids below "
                f"{config.vocab_size} only; prepare the dataset with this model's tokenizer"
            )
    edges = _edges(arguments.bands, documents.shape[1])
    losses, bands = {}, {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for entry in entries:
            task = progress.add_task(f"evaluating {entry.label}", total=len(documents))
            model, _ = load(entry.directory, rope=entry.rope, dtype=arguments.dtype)
            losses[entry.label] = position_losses(
                model,
                documents,
                batch_size=arguments.batch_size,
                progress=functools.partial(_advance, progress, task),
            )
            if not np.isfinite(losses[entry.label]).all():
                raise InputError(f"{entry.label}: the loss is not finite; expected sound weights, or --dtype float32")
            bands[entry.label] = band_losses(losses[entry.label], edges)
    window = min(config.max_position_embeddings for config in configs)
    return Comparison(losses, bands, len(documents), documents.shape[1], window)


def _check(arguments: argparse.Namespace, entries: list[Entry]) -> None:
    for option in ("length", "documents", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: a positive number is needed")
    if arguments.dtype not in DTYPES:
        raise unknown_name("--dtype", arguments.dtype, DTYPES)
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--model {label!r} is there twice; give each line a label of its own: LABEL=DIR")
    for entry in entries:
        if entry.rope is not None:
            Scheme.from_dict(entry.rope)


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def read_documents(directory: str, split: str, length: int | None, limit: int | None) -> Int[np.ndarray, "documents T"]:
    """Reads documents of one length.

    Args:
      directory: a dataset made by `eabf prepare`.
      split: its split.
      length: tokens to cut each document to; None takes the shortest one's length.
      limit: use the first so many; None takes all.

    Returns:
      int32 [documents, length].
    Raises:
      InputError: no such dataset, no document, or one shorter than the length asked for.
    """
    records = Records(directory, split)
    documents = [records[index]["tokens"] for index in range(min(len(records), limit or len(records)))]
    shortest = min(map(len, documents), default=0)
    if shortest < max(length or 0, 2):
        raise InputError(
            f"split {split!r} of {directory} has {len(documents)} documents, the shortest of {shortest} tokens; "
            f"{length or 2} are needed"
        )
    return np.stack([document[: length or shortest] for document in documents]).astype(np.int32)


def _edges(text: str | None, length: int) -> list[int]:
    if text is None:
        return default_edges(length)
    try:
        return [int(edge) for edge in text.split(",")]
    except ValueError as error:
        raise InputError(f"--bands {text!r} is not a list of positions such as 0,256,512,1024") from error


def table(comparison: Comparison) -> Table:
    """The comparison for people: one row a model, one column a band."""
    first = next(iter(comparison.bands.values()))
    title = f"loss by position, nats per token, {comparison.documents} documents of {comparison.length:,} tokens"
    grid = Table("model", *(f"{band.start:,}-{band.end:,}" for band in first), title=title)
    best = [min(bands[column].mean for bands in comparison.bands.values()) for column in range(len(first))]
    for label, bands in comparison.bands.items():
        cells = (f"{band.mean:.3f}" for band in bands)
        grid.add_row(
            label,
            *(
                f"[bold]{cell}[/bold]" if band.mean == low else cell
                for cell, band, low in zip(cells, bands, best, strict=True)
            ),
        )
    return grid


def as_json(comparison: Comparison, arguments: argparse.Namespace) -> dict[str, Any]:
    """The comparison for programs, with what it was measured on."""
    return {
        "documents": comparison.documents,
        "length": comparison.length,
        "unit": "nats per token",
        "half_width": "of the 95 % confidence interval over documents",
        "dtype": arguments.dtype,
        "models": list(arguments.model),
        "bands": {label: [dataclasses.asdict(band) for band in bands] for label, bands in comparison.bands.items()},
    }
