"""Reads entries from JSON, JSONL, CSV, Parquet, Arrow and text files, also compressed; `KINDS` lists the kinds."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from eabf_jax.data.forms import TEXT, holds_entries
from eabf_jax.data.json_stream import BrokenFile, Entry, scan
from eabf_jax.errors import InputError

_SNIFFED_BYTES = 4096
_ROWS = 64
_JSON_BEGINS = re.compile(rb"(?:\xef\xbb\xbf|\s)*[\[{]")
# A text may also begin with a bracket, so the next characters decide.
_JSON_BEGINS_SURELY = re.compile(rb'(?:\xef\xbb\xbf|\s)*(?:\{\s*"|\[\s*(?:\{\s*"|\[\s*\{))')

COMPRESSIONS: dict[str, tuple[bytes, Callable[..., Any]]] = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
}
# First bytes of unsupported kinds of files, and advice for the message.
UNREADABLE: dict[bytes, str] = {
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: decompress it first (zstd -d)",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"\x80\x03": "is a pickle, which is never loaded, since it can run any code: export the data as JSONL",
    b"\x80\x04": "is a pickle, which is never loaded, since it can run any code: export the data as JSONL",
    b"\x80\x05": "is a pickle, which is never loaded, since it can run any code: export the data as JSONL",
    b"\x89HDF": "is an HDF5 file: export the data as JSONL",
    b"SQLite format 3": "is an SQLite database: export the data as JSONL",
}


@dataclass(frozen=True)
class _File:
    """An opened file."""

    stream: IO[bytes]  # its bytes, decompressed
    name: str  # in errors
    is_plain: bool  # whether offsets in the stream are offsets in the file
    chunk_bytes: int  # bytes to read at a time
    repair: bool  # whether to accept trailing commas


def _json(file: _File) -> Iterator[Entry]:
    for entry in scan(file.stream, file.name, file.chunk_bytes, holds_entries, file.repair):
        yield entry if file.is_plain else entry._replace(offset=None)


def _text(file: _File) -> Iterator[Entry]:
    data = file.stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 at byte {error.start}: convert it") from None
    if text.strip():
        yield Entry(None, len(data), {"text": text})


def _csv(file: _File) -> Iterator[Entry]:
    csv.field_size_limit(1 << 28)
    text = io.TextIOWrapper(file.stream, "utf-8-sig", newline="")
    number = 0
    try:
        for row in csv.DictReader(text, delimiter="\t" if ".tsv" in Path(file.name).suffixes else ",", strict=True):
            if None in row or None in row.values():
                raise csv.Error("more or fewer fields than the first line names")
            yield Entry(None, 0, row)
            number += 1
    except UnicodeDecodeError:
        raise InputError(f"{file.name} is not UTF-8 after row {number}: convert it") from None
    except csv.Error as error:
        raise InputError(f"{file.name} is not valid CSV after row {number}: {error}") from None
    finally:
        text.detach()  # otherwise the stream would be closed too


def _parquet(file: _File) -> Iterator[Entry]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file.stream).iter_batches(batch_size=_ROWS):
            yield from (Entry(None, 0, _plain(row)) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "Parquet", error) from None


def _arrow(file: _File) -> Iterator[Entry]:
    """Reads both Arrow formats: the stream format, which `datasets` writes, and the file format."""
    import pyarrow

    try:
        is_file_format = file.stream.read(6) == b"ARROW1"
        file.stream.seek(0)
        if is_file_format:
            reader = pyarrow.ipc.open_file(file.stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file.stream))
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS):
                yield from (Entry(None, 0, _plain(row)) for row in batch.slice(begin, _ROWS).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "Arrow", error) from None


def _plain(row: dict[str, Any]) -> Any:
    """Converts a row to JSON values; pictures, dates and similar values become strings."""
    return json.loads(json.dumps(row, default=str))


def _unreadable(file: _File, kind: str, error: Exception) -> InputError:
    return InputError(f"{file.name} is not a whole {kind} file: {(str(error).splitlines() or ['unreadable'])[0]}")


KINDS: dict[str, Callable[[_File], Iterator[Entry]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}


def read_entries(
    path: Path, form: str, chunk_bytes: int, repair: bool, progress: Callable[[int], None]
) -> Iterator[Entry]:
    """Reads the entries of a file.

    Args:
      form: the requested form; with `text`, a file of unknown kind is one document.
      chunk_bytes: bytes to read at a time.
      repair: whether to accept commas before a closing bracket.
      progress: called with the number of the file's bytes read so far.

    Raises:
      BrokenFile: the file is truncated or malformed.
      InputError: the file is unreadable or of an unsupported kind.
    """
    try:
        with path.open("rb") as raw:
            stream: IO[bytes] = raw
            name = path.name.lower()
            entries = reached = 0
            try:
                begins = raw.read(_SNIFFED_BYTES)
                raw.seek(0)
                for suffix, (magic, opened) in COMPRESSIONS.items():
                    if begins.startswith(magic):
                        stream = opened(raw)
                        begins = stream.read(_SNIFFED_BYTES)
                        stream.seek(0)
                        name = name.removesuffix(suffix)
                file = _File(stream, str(path), stream is raw, chunk_bytes, repair)
                for entry in _kind(path, name, begins, form)(file):
                    yield entry
                    entries += 1
                    reached = max(reached, raw.tell())
                    progress(reached)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise BrokenFile(f"{path} is damaged ({error})", raw.tell(), entries, raw.tell()) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _kind(path: Path, name: str, begins: bytes, form: str) -> Callable[[_File], Iterator[Entry]]:
    """Finds the kind of a file, first by its first bytes and then by its name."""
    for magic, advice in UNREADABLE.items():
        if begins.startswith(magic):
            raise InputError(f"{path} {advice}")
    for magic, suffix in _MAGIC.items():
        if begins.startswith(magic):
            return KINDS[suffix]
    kind = KINDS.get(Path(name).suffix)
    is_surely_json = _JSON_BEGINS_SURELY.match(begins) is not None
    if kind is _text:
        return _json if is_surely_json and form != TEXT else _text
    if kind is not None and kind is not _json:
        return kind
    if kind is None and form == TEXT:
        return _json if is_surely_json else _text
    if _JSON_BEGINS.match(begins) or not begins.strip():
        return _json
    if form == TEXT:
        return _text
    start = len(begins) - len(begins.lstrip())
    mark = begins[start : start + 4].decode("utf-8", "replace")[:1]
    raise InputError(
        f"{path} is not JSON ({mark!r} found at byte {start}), nor of another supported kind "
        f"({', '.join(KINDS)}); --format {TEXT} reads it as one document"
    )


def files_of(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Finds the files to read.

    Args:
      paths: files, directories of files, or directories saved by `datasets`.

    Returns:
      The files, and the names of skipped files and folders in the directories.

    Raises:
      InputError: a directory has no supported files, or several splits.
    """
    files: list[Path] = []
    skipped: list[str] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        names = {entry.name for entry in inside}
        folders = [str(entry) for entry in inside if entry.is_dir()]
        if "eabf_dataset.json" in names:
            raise InputError(f"{path} is already prepared: train on it, or name its source files")
        if "dataset_dict.json" in names:
            raise InputError(f"{path} is a saved dataset with several splits: name one of {', '.join(folders)}")
        if "state.json" in names:
            files += _saved_dataset(path)
            continue
        data = [entry for entry in inside if entry.is_file() and entry.name != "dataset_info.json"]
        found = [entry for entry in data if _has_known_suffix(entry)]
        if not found:
            hint = f"; it holds the folders {', '.join(folders[:4])}" if folders else ""
            raise InputError(f"{path} holds no file of a known kind ({', '.join(KINDS)}){hint}")
        files += found
        skipped += [str(entry) for entry in inside if entry not in found]
    return files, skipped


def _has_known_suffix(path: Path) -> bool:
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return Path(name).suffix in KINDS


def _saved_dataset(path: Path) -> list[Path]:
    """Returns the files of a dataset saved by `datasets`' `save_to_disk`, in its order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files = [path / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / 'state.json'} is damaged ({error}): save the dataset again") from None
    for key in ("_indices_files", "_indices_data_files"):
        if state.get(key):
            raise InputError(f"{path} holds a selection of rows ({key}): save the result of flatten_indices()")
    return files
