"""Destinations of results: an unused name, or an earlier result of eabf-jax, and nothing else."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from eabf_jax.errors import InputError


def no_space(error: BaseException) -> tuple[str, BaseException] | None:
    """Detects a write that failed because the disk is full, or a quota or file size limit is reached.

    Returns:
      The reason, and the error that gives it: this one, or one that caused it. None for any other failure.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # causes can form a ring
        seen.add(id(cause))
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            # TensorStore reports a full disk as a ValueError that only its text identifies.
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                reason = "no space left" if number == errno.ENOSPC else os.strerror(number).lower()
                return reason, cause
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` if the block succeeds, and removed if it fails.

    Args:
      path: a file, or a directory that does not exist yet.

    Yields:
      A path in the same directory, with the same suffix.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    _remove(partial)  # a killed process may have left one
    try:
        yield partial
        partial.replace(path)
    finally:
        _remove(partial)


class Mark(NamedTuple):
    """How to recognise a directory that we wrote: a file with a JSON object, and keys of that object.

    Attributes:
      kind: the directory's kind, for messages.
      file: name of the file.
      keys: keys that the object must have.
      entries: patterns of the names that such a directory may hold beside the file; empty if the object lists `files`.
    """

    kind: str
    file: str
    keys: tuple[str, ...]
    entries: tuple[str, ...] = ()

    def read(self, directory: Path) -> dict[str, Any] | None:
        """Reads the object; None if a directory does not carry the mark, whatever else it holds."""
        try:
            found = json.loads((directory / self.file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and all(key in found for key in self.keys) else None

    def fault(self, directory: Path) -> str | None:
        """Returns why a directory is not of this kind, or None if it is and holds nothing but what we write.

        A mark that lists `files` is valid only if the directory holds exactly those.
        """
        found = self.read(directory)
        if found is None:
            return f"no {self.file} marks it as {self.kind}"
        if self.entries:
            for name in sorted(entry.name for entry in directory.iterdir()):
                if name != self.file and not any(fnmatchcase(name, pattern) for pattern in self.entries):
                    return f"eabf-jax did not write {name} in it"
        if "files" in self.keys:
            listed = found["files"] if isinstance(found["files"], dict) else {}
            there = file_sizes(directory)
            there.pop(self.file)
            for name in sorted({*there, *listed}):
                if there.get(name) != listed.get(name):
                    return f"{name} in it is not as eabf-jax wrote it"
        return None


def file_sizes(directory: Path) -> dict[str, int]:
    """Returns the size in bytes of every file below a directory, by its relative path."""
    return {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}


def check_destination(
    destination: Path | str, mark: Mark | None = None, *, overwrite: bool = False, sources: Iterable[Path | str] = ()
) -> None:
    """Refuses a directory that a result must not be written to.

    If a killed process had set an earlier result aside to replace it, that result is first put back.

    Args:
      mark: how to recognise an earlier result of this kind; None if results are never replaced.
      overwrite: whether an earlier result may be replaced.
      sources: files and directories that the result is made from.

    Raises:
      InputError: the destination is a file, a symbolic link or a mount point; its parent is not writable; it is,
        contains or is inside a source; it is not empty, and `overwrite` is not set or its content is not recognised as
        ours.
    """
    target = Path(destination)
    if target.is_file() and not target.is_symlink():
        raise InputError(f"{target} is a file: name a directory, or a path that does not exist yet")
    _check_place(target, "directory", sources)
    target = target.absolute()  # through the parent, so that "." has a name
    if mark is not None and not target.exists():
        earlier = [old for old in _set_aside(target) if mark.fault(old) is None]
        if earlier:
            earlier[0].rename(target)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if mark is None:
        raise InputError(f"{destination} is not empty: name another directory")
    fault = mark.fault(target)
    if fault is not None:
        raise InputError(f"{destination} is not empty, and {fault}: name another directory, or remove it by hand")
    if not overwrite:
        raise InputError(f"{destination} is not empty; pass --overwrite to replace it, or name another directory")


def check_file(
    destination: Path | str,
    fault: Callable[[Path], str | None],
    *,
    overwrite: bool = False,
    sources: Iterable[Path | str] = (),
) -> None:
    """Refuses a file that a result must not be written to, by the rules of `check_destination`.

    Args:
      fault: returns why an existing file is not an earlier result of this kind, or None if it is one.
      overwrite, sources: as for `check_destination`.

    Raises:
      InputError: as for `check_destination`, with a file and a directory exchanged.
    """
    target = Path(destination)
    if target.is_dir() and not target.is_symlink():
        raise InputError(f"{target} is a directory: name a file, or a path that does not exist yet")
    _check_place(target, "file", sources)
    if not target.exists():
        return
    reason = fault(target)
    if reason is not None:
        raise InputError(f"{destination} exists, and {reason}: name another file, or remove it by hand")
    if not overwrite:
        raise InputError(f"{destination} exists; pass --overwrite to replace it, or name another file")


def _check_place(target: Path, kind: str, sources: Iterable[Path | str]) -> None:
    """Refuses a destination that is a symbolic link, is not apart from its sources or cannot be created."""
    if target.is_symlink():
        raise InputError(f"{target} is a symbolic link to {os.readlink(target)}: name the {kind} itself")
    check_name(target.absolute())
    check_apart(target, sources)
    place = target.absolute()
    if place.is_mount():  # results are renamed into place, which no mount point allows
        raise InputError(f"{target} is a mount point, which cannot be replaced: name a {kind} in it")
    above = next((parent for parent in place.parents if parent.exists()), place)
    if not above.is_dir():
        raise InputError(f"{target}: {above} is a file, so nothing can be created in it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{target}: {above} is not writable; name another directory")


def check_name(path: Path | str) -> None:
    """Refuses a name whose bytes are no UTF-8, because the libraries that write tensors do not take it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: the name is not valid UTF-8: name another path") from error


def check_apart(destination: Path | str, sources: Iterable[Path | str]) -> None:
    """Refuses a destination that is, contains or is inside a source of the result; follows symbolic links."""
    target = Path(destination).resolve()
    for source in sources:
        own = Path(source).resolve()
        if target == own or target in own.parents or own in target.parents:
            relation = "is" if target == own else "holds" if target in own.parents else "lies in"
            raise InputError(f"{destination} {relation} the source {source}: name another directory")


@contextmanager
def partial_directory(destination: Path | str) -> Iterator[Path]:
    """Yields an empty directory beside the destination to write the result into; `put_in_place` renames it.

    It is removed when the block ends, unless it was renamed. Directories that killed processes left for the same
    destination are removed first. Those of live processes are locked; on a file system shared with other hosts, the
    lock covers those hosts only if that file system supports locks.

    Args:
      destination: checked by `check_destination`; missing parents are created.

    Yields:
      The absolute path of the directory, which has ordinary permissions.
    """
    target = Path(destination).absolute()  # through the parent, so that "." has a name
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for left in target.parent.glob(f"{escape(prefix)}*"):
        with _locked_directory(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with _new_locked_directory(prefix, target.parent) as partial:
        try:
            mask = os.umask(0)
            os.umask(mask)
            partial.chmod(0o777 & ~mask)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _new_locked_directory(prefix: str, parent: Path) -> Iterator[Path]:
    """Creates a directory and locks it; where the file system has no locks, it is created without one."""
    while True:
        # The name has no process id: in containers, a killed process may have had the same id.
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with _locked_directory(made) as free:
            # Before it was locked, another process may have taken it for one that a killed process left.
            if made.exists() and free is not False:
                yield made
                return


@contextmanager
def _locked_directory(path: Path) -> Iterator[bool | None]:
    """Locks a directory during the block; yields False if it is locked already or missing, None without locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        yield None if error.errno == errno.EACCES else False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked: bool | None = True
    except OSError as error:
        locked = False if error.errno == errno.EAGAIN else None
    try:
        yield locked
    finally:
        os.close(descriptor)


def put_in_place(finished: Path, destination: Path | str) -> None:
    """Renames a finished directory to its destination; an earlier one is set aside, and put back on any error.

    Args:
      destination: checked by `check_destination`.
    """
    target = Path(destination).absolute()
    if not target.exists():
        finished.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        target.rename(old)
        finished.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        with suppress(OSError):
            old.rmdir()
        raise
    for old in _set_aside(target):
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(target: Path) -> list[Path]:
    """Lists what `put_in_place` has set aside; leftovers mean that a process was killed."""
    return sorted(target.parent.glob(f".{escape(target.name)}.old-*"))


@contextmanager
def replacing(directory: Path, names: Iterable[str]) -> Iterator[None]:
    """Sets entries of a directory aside while new ones are written, then deletes them, or puts them back on an error.

    Args:
      directory: an existing directory that no other process writes to.
      names: entries to replace; they need not exist.
    """
    names = tuple(names)
    there = [name for name in names if (directory / name).exists()]
    aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=directory))
    try:
        for name in there:
            (directory / name).rename(aside / name)
        yield
    except BaseException:
        for name in names:
            if name not in there or (aside / name).exists():
                _remove(directory / name)
            if (aside / name).exists():
                (aside / name).rename(directory / name)
        aside.rmdir()
        raise
    for old in directory.glob(".replaced-*"):
        shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
