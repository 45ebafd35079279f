"""Options that several commands have: `--json` and `--figure` name files, and numbers have to be positive."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import write_json


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses a file of `--json` or `--figure` that could not be written, before hours of work for it."""
    _check_file("--json", getattr(arguments, "json", None))
    _check_file("--figure", getattr(arguments, "figure", None), (".png", ".svg", ".pdf"))


def _check_file(option: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{option} {path} is a directory; expected a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {target.parent}; make it, or name another file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: nothing can be written in {target.parent}; name another file")
    if suffixes and target.suffix not in suffixes:
        raise InputError(f"{option} {path} ends in {target.suffix!r}; expected one of {', '.join(suffixes)}")
    if not suffixes and target.is_file() and target.stat().st_size:
        # Figures of an earlier call are replaced; a file that a slip of the fingers names is not.
        with target.open("rb") as file:
            if file.read(1) != b"{":
                raise InputError(f"{option} {path} is there, and holds no figures (a JSON object): name another file")


def check_positive(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Refuses options that are numbers below 1; they may be None."""
    for option in options:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: a positive number is needed")


def write_figures(arguments: argparse.Namespace, figures: Mapping[str, Any], kind: str = "figures") -> None:
    """Writes the file that `--json` asks for, and says so."""
    if arguments.json:
        write_json(Path(arguments.json), dict(figures))
        print(f"{kind}: {arguments.json}")
