"""Directories that appear whole or not at all, and JSON files read with errors that name them."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eabf_jax import __version__
from eabf_jax.destination import Mark, check_destination, file_sizes, make_partial, no_space, put_in_place, whole
from eabf_jax.errors import InputError

# A model that was exported for transformers. Its own mark, which lists what was written: config.json is like any other
# model's, and what somebody has trained further or added to is no longer ours.
EXPORT = Mark("a model that eabf-jax exported", "eabf_jax.json", ("eabf_jax", "files"))


@contextmanager
def new_directory(
    destination: Path | str,
    mark: Mark | None = None,
    *,
    overwrite: bool = False,
    sources: Iterable[Path | str] = (),
) -> Iterator[Path]:
    """Gives a directory to fill, which takes the destination's name once the block ends without an error.

    Args:
      destination: the directory to make; its parents are made too.
      mark: what an earlier result is known by, which alone may be replaced; None where none is. `EXPORT` is written
        here.
      overwrite, sources: as for `check_destination`.

    Yields:
      A directory beside the destination.

    Raises:
      InputError: as `check_destination`, or the disk is full. What was written is removed on any error, and what was
        to be replaced stays.
    """

    def check() -> None:
        check_destination(destination, mark, overwrite=overwrite, sources=sources)

    check()
    partial = make_partial(destination)
    try:
        yield partial
        if mark is EXPORT:
            write_json(partial / mark.file, {"eabf_jax": __version__, "files": file_sizes(partial)})
        check()  # much may have happened since
        put_in_place(partial, destination)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if full := no_space(error):
            raise InputError(f"{full[0]} on device while writing {destination}; nothing was kept") from error
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark first
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented; it appears whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
