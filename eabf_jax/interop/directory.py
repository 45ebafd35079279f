"""Writes directories and large files atomically, and reads and writes JSON files."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eabf_jax import __version__
from eabf_jax.checksums import write_checksums
from eabf_jax.destination import (
    Mark,
    check_destination,
    check_file,
    file_sizes,
    no_space,
    partial_directory,
    put_in_place,
    whole,
)
from eabf_jax.errors import InputError
from eabf_jax.reading import read_json

# An exported model needs its own mark, because its config.json looks like any other model's. The mark lists the files
# written, so a model that someone has trained further or added files to is no longer taken for an export.
EXPORT = Mark("a model that eabf-jax exported", "eabf_jax.json", ("eabf_jax", "files"))


@contextmanager
def new_directory(
    destination: Path | str,
    mark: Mark | None = None,
    *,
    overwrite: bool = False,
    sources: Iterable[Path | str] = (),
) -> Iterator[Path]:
    """Yields a temporary directory to fill, and renames it to the destination if the block succeeds.

    On any error the temporary directory is removed, and an existing destination stays.

    Args:
      destination: the directory to make; its parents are made too.
      mark: identifies an earlier result, the only thing that may be replaced; None allows no replacement. The file of
        `EXPORT` is written here, and checksums of the others.
      overwrite, sources: as for `check_destination`.

    Yields:
      A directory beside the destination.

    Raises:
      InputError: as for `check_destination`, or the disk is full.
    """

    def check() -> None:
        check_destination(destination, mark, overwrite=overwrite, sources=sources)

    check()
    with _nothing_kept(destination), partial_directory(destination) as partial:
        yield partial
        if mark is EXPORT:
            write_checksums(partial)
            write_json(partial / mark.file, {"eabf_jax": __version__, "files": file_sizes(partial)})
        check()  # again, because the block may have taken hours
        put_in_place(partial, destination)


@contextmanager
def new_file(
    destination: Path | str,
    fault: Callable[[Path], str | None],
    *,
    overwrite: bool = False,
    sources: Iterable[Path | str] = (),
) -> Iterator[Path]:
    """Yields a temporary file to write, and renames it to the destination if the block succeeds; see `new_directory`.

    Args:
      fault, overwrite, sources: as for `check_file`.

    Raises:
      InputError: as for `check_file`, or the disk is full.
    """

    def check() -> None:
        check_file(destination, fault, overwrite=overwrite, sources=sources)

    check()
    target = Path(destination).absolute()
    with _nothing_kept(destination), partial_directory(target) as folder:
        partial = folder / target.name
        yield partial
        check()  # again, because the block may have taken hours
        partial.replace(target)


@contextmanager
def _nothing_kept(destination: Path | str) -> Iterator[None]:
    """Turns the error of a full disk into InputError."""
    try:
        yield
    except BaseException as error:
        if full := no_space(error):
            raise InputError(f"{full[0]} on device while writing {destination}; nothing was kept") from error
        raise


def is_inside(path: Path, directory: Path) -> bool:
    """Returns whether a path of a model directory leads, through any links, to a file in it.

    In the Hub's cache, the files of `snapshots/REVISION` are links to files in `blobs`, which count as inside.
    """
    own, target = directory.resolve(), path.resolve()
    is_blob = own.parent.name == "snapshots" and target.parent == own.parent.parent / "blobs"
    return own in target.parents or (path.is_symlink() and is_blob)


def refuse_pointer(path: Path) -> None:
    """Raises InputError if a file is not the data itself but Git LFS's pointer to it, as a clone without LFS has it."""
    start = b"version https://git-lfs"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(start)) == start:
                raise InputError(f"{path}: only Git LFS's pointer to the file; run `git lfs pull` in its directory")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      InputError: the file is missing, not JSON, or not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented and atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
