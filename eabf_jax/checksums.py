"""Checksums of files: written beside data before it counts as whole, and compared when it is read."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from eabf_jax.destination import whole

# Lists every other file below its directory: {"algorithm", "files": {name: {"bytes", "digest"}}, "digest": of the rest}
CHECKSUMS = "checksums.json"
# XXH3 finds accidents, not forgeries; it hashes faster than a disk reads, so a load hardly takes longer.
_ALGORITHM = "xxh3_128"
_BLOCK = 4 * 2**20
_THREADS = min(8, os.cpu_count() or 1)
_DIFFERS = "its digest is not the one it was written with"


class Checked(NamedTuple):
    """What comparing a directory with its checksums has found."""

    files: int  # that were compared
    bytes: int
    faults: tuple[str, ...] = ()  # one line per damaged file, which begins with its path


class _Entry(NamedTuple):
    name: str
    bytes: int
    digest: str


def write_checksums(directory: Path) -> None:
    """Writes the checksums of all files below a directory into its `checksums.json`."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "digest": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    told = {"algorithm": _ALGORITHM, "files": files}
    with whole(directory / CHECKSUMS) as partial:
        partial.write_text(json.dumps({**told, "digest": _digest_of(told)}, indent=1) + "\n", encoding="utf-8")


def check(directory: Path, share: int = 0, shares: int = 1) -> Checked | None:
    """Compares the files below a directory with its `checksums.json`.

    Args:
      directory: filled by `write_checksums`.
      share, shares: compares only the files of this share, of so many that together are all files; each process of a
        run can thus read a part.

    Returns:
      What was found; None if the directory has no checksums.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return None
    written = _read(path)
    if written is None:
        return Checked(1, path.stat().st_size, (f"{path}: damaged: {_DIFFERS}",))
    written = sorted(written, key=lambda entry: -entry.bytes)[share::shares]
    faults, same = [], []
    for entry in written:
        file = directory / entry.name
        size = file.stat().st_size if file.is_file() else None
        if size == entry.bytes:
            same.append(entry)
        else:
            found = "missing" if size is None else f"damaged: it has {size:,} bytes, {entry.bytes:,} were written"
            faults.append(f"{file}: {found}")
    for entry, digest in zip(same, _digests([directory / entry.name for entry in same]), strict=True):
        if digest != entry.digest:
            faults.append(f"{directory / entry.name}: damaged: {_DIFFERS}")
    return Checked(len(written), sum(entry.bytes for entry in written), tuple(sorted(faults)))


def _read(path: Path) -> list[_Entry] | None:
    """Reads the list of files; None if it is not as it was written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("digest") != _digest_of(found) or found["algorithm"] != _ALGORITHM:
            return None
        return [_Entry(str(name), int(told["bytes"]), str(told["digest"])) for name, told in found["files"].items()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _digests(paths: Sequence[Path]) -> list[str]:
    """Computes the digests of files in threads, because xxhash and reading release Python's lock."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_digest, paths))


def _digest(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _digest_of(value: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
