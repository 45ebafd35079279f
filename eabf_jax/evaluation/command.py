"""What the commands of `eabf evaluate` share: several models side by side, and a record of how figures were made."""

import argparse
import dataclasses
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eabf_jax import __version__
from eabf_jax.data.dataset import tokenizer_digest
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.loading import DTYPES, read_config, split_scheme
from eabf_jax.interop.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.rope import Scheme


class Entry(NamedTuple):
    """One line of the table."""

    label: str
    directory: str
    rope: dict[str, Any] | None = None  # None: the model's own scheme
    window: int | None = None  # tokens to take for its window; None: its own

    @property
    def config(self) -> LlamaConfig:
        """The model's shape, with the window that it is taken for."""
        config = read_config(self.directory)
        return config if self.window is None else dataclasses.replace(config, max_position_embeddings=self.window)


def parse_entry(text: str) -> Entry:
    """Reads `[LABEL=]DIR[@{type: ..., window: ...}]`.

    Args:
      text: from the command line.

    Returns:
      The label (the directory where none is given), the directory, and scheme and window to use in place of its own.
    Raises:
      InputError: what follows @ is not a mapping.
    """
    model, rope, window = split_scheme(text)
    label, equals, directory = model.partition("=")
    return Entry(label if equals else model, directory if equals else model, rope, window)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what all commands of `eabf evaluate` take."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[LABEL=]DIR[@SCHEME]",
        help="a Hugging Face or native directory; after @ a rotary scheme to use instead of its own, as YAML: "
        "'yarn=models/tiny@{type: yarn, factor: 4, pretrained_window: 512}'; `window: 512` there takes the model for "
        "one with a smaller window. Repeat for more lines",
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--batch-size", type=int, default=1, help="rows that each device reads at a time (default: 1)")
    parser.add_argument("--json", help="write the figures here")


def check(arguments: argparse.Namespace, positive: Sequence[str] = ()) -> list[Entry]:
    """Tells what is wrong before hours of work.

    Args:
      arguments: as declared by `add_arguments`.
      positive: further options that have to be positive numbers, or None.

    Returns:
      The models.
    Raises:
      InputError: a number that is not positive, an unknown dtype or scheme, or a label that is there twice.
    """
    for option in ("batch_size", *positive):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: a positive number is needed")
    if arguments.dtype not in DTYPES:
        raise unknown_name("--dtype", arguments.dtype, DTYPES)
    entries = [parse_entry(text) for text in arguments.model]
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--model {label!r} is there twice; give each line a label of its own: LABEL=DIR")
    for entry in entries:
        if entry.rope is not None:
            Scheme.from_dict(entry.rope)
    return entries


def numbers(option: str, text: str, example: str) -> list[int]:
    """Reads a list of whole numbers.

    Args:
      option: its name on the command line.
      text: numbers with commas between them.
      example: what would be right.

    Returns:
      The numbers.
    Raises:
      InputError: something else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a list of {example}") from error


def tokenizer_of(directory: str) -> Tokenizer:
    """Loads a model's tokenizer, which its evaluation cannot do without.

    Args:
      directory: the model's.

    Returns:
      The tokenizer.
    Raises:
      InputError: the directory has none.
    """
    if not has_tokenizer(directory):
        raise InputError(f"{directory} has no tokenizer: copy tokenizer.json or tokenizer.model into it")
    return load_tokenizer(directory)


def same_tokenizer(tokenizers: Sequence[Tokenizer]) -> bool:
    """Whether tokenizers turn texts into the same tokens."""
    return len({tokenizer_digest(tokenizer) for tokenizer in tokenizers}) <= 1


def progress_bar() -> Progress:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def measured_on() -> dict[str, Any]:
    """How figures were made, for whoever wants to make them again: command, date, device and versions."""
    packages = ("jax", "jaxlib", "flax", "numpy", "tokenizers", "sentencepiece")
    # Not where it is installed: that says nothing to others.
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
