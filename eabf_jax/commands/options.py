"""Checks of options that several commands share: the files of `--json` and `--figure`, and positive numbers."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import write_json


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses a `--json`, `--csv` or `--figure` file that cannot be written, before hours of work."""
    _check_file("--json", getattr(arguments, "json", None))
    _check_file("--csv", getattr(arguments, "csv", None), (".csv",))
    _check_file("--figure", getattr(arguments, "figure", None), (".png", ".svg", ".pdf"))


def _check_file(option: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{option} {path} is a directory; expected a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {target.parent}; create it, or name another file")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {target.parent} is not writable; name another file")
    if suffixes and target.suffix not in suffixes:
        raise InputError(f"{option} {path} ends in {target.suffix!r}; expected one of {', '.join(suffixes)}")
    if not suffixes and target.is_file() and target.stat().st_size:
        # Figures of an earlier call are replaced, but not a file that was named by mistake.
        with target.open("rb") as file:
            if file.read(1) != b"{":
                raise InputError(f"{option} {path} exists and does not hold figures (a JSON object): name another file")


def check_positive(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Refuses numbers below 1; None is allowed."""
    for option in options:
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: a positive number is needed")


def write_figures(arguments: argparse.Namespace, figures: Mapping[str, Any], kind: str = "figures") -> None:
    """Writes the figures to the `--json` file, if there is one, and prints its path."""
    if arguments.json:
        write_json(Path(arguments.json), dict(figures))
        print(f"{kind}: {arguments.json}")
