"""Directories that appear whole or not at all, and JSON files read with errors that name them."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eabf_jax.errors import InputError


@contextmanager
def new_directory(destination: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Gives a directory to fill, which takes the destination's name once the block ends without an error.

    Args:
      destination: the directory to make; its parents are made too.
      overwrite: whether it may replace a directory that is not empty.

    Yields:
      A directory beside the destination.

    Raises:
      InputError: the destination is a file, or not empty without `overwrite`, or the disk is full. What was written
        is removed on any error.
    """
    target = Path(destination)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; expected a directory to write, or a name that is free")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty; pass --overwrite to replace it, or name another directory")
    # Absolute because Orbax wants that, through the parent so that "." has a name.
    target = target.absolute()
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.replace(target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Tensorstore reports a full disk through a ValueError whose text is all there is.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise InputError(f"no space left on device while writing {target}; nothing was kept") from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.

    Returns:
      The object.

    Raises:
      InputError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented; it appears whole or not at all.

    Args:
      path: the file.
      value: the object.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
