"""What the commands of `eabf evaluate` share: options, loading of models, and reports."""

import argparse
import gc
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from eabf_jax import __version__
from eabf_jax.commands.options import check_positive, write_figures
from eabf_jax.console import Grid, show
from eabf_jax.data.dataset import tokenizer_digest
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.evaluation.documents import is_text, read_documents
from eabf_jax.evaluation.scorer import evaluation_mesh
from eabf_jax.interop.loading import DTYPES, Entry, load, parse_entry
from eabf_jax.interop.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import gpu_memory_defaults, use_every_core
from eabf_jax.rope import Scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that all commands of `eabf evaluate` share."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="[LABEL=]DIR[@SCHEME]",
        help="a Hugging Face or native directory; @ and a rotary scheme in YAML replace the model's own: "
        "'yarn=models/tiny@{type: yarn, factor: 4, pretrained_window: 512}'; `window: 512` there makes the model count "
        "as one with that smaller window. Repeat to compare models",
    )
    add("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    add("--batch-size", type=int, default=1, help="rows that each device reads at a time (default: 1)")
    add("--tensor", type=int, default=1, help="devices that share the model's heads (default: 1)")
    add("--json", help="write the figures to this file")


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options that choose the documents."""
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help="a dataset made by `eabf prepare`; or texts, read with the models' tokenizer: a file or directory that "
        '`eabf prepare --format text` reads, such as .txt (one document) or .jsonl (one a line, under "text")',
    )
    add("--split", default="held_out", help="split of a dataset (default: held_out)")
    add("--length", type=int, help="cut documents to this many tokens (default: the shortest one's)")
    add("--skip-shorter", action="store_true", help="leave out documents shorter than --length")
    add("--documents", type=int, help="number of documents to use, from the first (default: all)")


def begin(arguments: argparse.Namespace, positive: Sequence[str] = ()) -> list[Entry]:
    """Sets up JAX, before its first use, and checks the options before hours of work; returns the models.

    Args:
      positive: further options that must be positive or None.

    Raises:
      InputError: a number that is not positive, an unknown dtype or scheme, or a label used twice.
    """
    use_every_core()
    gpu_memory_defaults()
    check_positive(arguments, ("batch_size", "tensor", *positive))
    if arguments.dtype not in DTYPES:
        raise unknown_name("--dtype", arguments.dtype, DTYPES)
    entries = [parse_entry(text) for text in arguments.model]
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--model {label!r} is used twice; give each model its own label: LABEL=DIR")
    for entry in entries:
        if entry.rope is not None:
            Scheme.from_dict(entry.rope)
    return entries


def numbers(option: str, text: str, example: str) -> list[int]:
    """Reads an option's whole numbers, separated by commas; `example` completes the error message."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a list of {example}") from error


def tokenizer_of(directory: str) -> Tokenizer:
    """Loads a model's tokenizer.

    Raises:
      InputError: the directory has none.
    """
    if not has_tokenizer(directory):
        raise InputError(f"{directory} has no tokenizer: copy tokenizer.json or tokenizer.model into it")
    return load_tokenizer(directory)


def documents_of(arguments: argparse.Namespace, entries: Sequence[Entry]) -> Int[np.ndarray, "documents T"]:
    """Reads the documents of `add_document_arguments`.

    Raises:
      InputError: as `read_documents`; the models' tokenizers differ, or ids exceed a model's vocabulary.
    """
    tokenizer = None
    if is_text(arguments.data):
        tokenizers = [tokenizer_of(entry.directory) for entry in entries]
        if len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) > 1:
            raise InputError(
                "the models' tokenizers differ, and losses per token are comparable only with the same tokenizer: run "
                "the command once for each tokenizer"
            )
        tokenizer = tokenizers[0]
    documents = read_documents(
        arguments.data,
        arguments.split,
        arguments.length,
        arguments.documents,
        tokenizer=tokenizer,
        skip_shorter=arguments.skip_shorter,
    )
    for entry in entries:
        if documents.max() >= entry.config.vocab_size:
            raise InputError(
                f"{arguments.data} holds token id {documents.max()}, {entry.directory} only has ids below "
                f"{entry.config.vocab_size}; prepare the dataset with this model's tokenizer"
            )
    return documents


def model_of(entry: Entry, arguments: argparse.Namespace) -> Llama:
    """Loads a model onto the devices that share its evaluation.

    Raises:
      InputError: as `load`; `--tensor` does not divide the devices, or the model.
    """
    gc.collect()  # frees the model before it, whose arrays are part of a cycle
    mesh = evaluation_mesh(entry.config, arguments.dtype, arguments.tensor)
    return load(entry.directory, entry.rope, arguments.dtype, mesh)[0]


def report(
    arguments: argparse.Namespace, table: Grid, figures: Mapping[str, Any], draw: Callable[[Path], None] | None = None
) -> None:
    """Prints an evaluation's table, and writes the files of `--json` and `--figure`.

    Args:
      arguments: has `json`, and also `figure` if there is a picture.
      figures: JSON values; the file holds the table as well.
      draw: draws the picture into a file.
    """
    show(table)
    write_figures(arguments, {**figures, "table": table.plain()})
    if draw is not None and arguments.figure:
        draw(Path(arguments.figure))
        print(f"picture: {arguments.figure}")


def measured_on() -> dict[str, Any]:
    """Returns what is needed to reproduce figures: command, date, devices and versions."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "sentencepiece")
    # Without the path of the installed command, which means nothing to others.
    program = "eabf" if Path(sys.argv[0]).name in ("eabf", "__main__.py") else sys.argv[0]
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": {
            "eabf_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
