"""Writes and reads prepared records: a TFDS dataset in ArrayRecord files, without TensorFlow."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from jaxtyping import Int32
from tensorflow_datasets.core import example_serializer, naming, splits

from eabf_jax.data.chat import Encoded, Tokenizer
from eabf_jax.destination import Mark, check_destination, partial_directory, put_in_place
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import check
from eabf_jax.reading import parse_json, reading

NAME = "sharegpt"
METADATA_FILE = "eabf_dataset.json"
_ENTRIES = ("dataset_info.json", "features.json", "lengths-*.npy", f"{NAME}-*.array_record-*")
DATASET = Mark("a prepared dataset", METADATA_FILE, ("format", "splits"), _ENTRIES)
FORMAT = 1
SHARD_BYTES = 1 << 28

# Tokenizers that agree on this text count as equal: it has scripts, digits, code, white space and token names.
_PROBE = (
    "The quick brown fox can't jump over 13,579 lazy dogs.\n\tdef f(x):\n        return x**2  # naïve\n"
    "Größe, год, 東京, 한국어, العربية, 🙂 <s> </s> <|im_start|> [INST] <<SYS>> https://example.org/?a=b&c=%20\n\n"
)


_FEATURES = tfds.features.FeaturesDict(
    {
        "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        "loss_mask": tfds.features.Tensor(shape=(None,), dtype=np.bool_),
        "id": tfds.features.Text(),
    }
)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Computes a digest (16 hexadecimal digits) of a tokenizer's behaviour, whatever file it comes from."""
    behaviour = [tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, list(tokenizer.encode(_PROBE))]
    return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()[:16]


@dataclass
class _Split:
    """One split while it is being written."""

    lengths: list[int] = field(default_factory=list)
    responses: int = 0
    shard_lengths: list[int] = field(default_factory=list)
    num_bytes: int = 0
    shard_bytes: int = 0
    writer: array_record_module.ArrayRecordWriter | None = None


class DatasetWriter:
    """A context manager that writes a dataset beside its destination and moves it there when it is complete.

    On exit, an unfinished dataset is removed.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        overwrite: bool = False,
        sources: Iterable[Path | str] = (),
        shard_bytes: int = SHARD_BYTES,
    ):
        """Checks that the destination may be written.

        Args:
          directory: destination of the dataset.
          overwrite, sources: as for `check_destination`.
          shard_bytes: size at which a new file begins.

        Raises:
          InputError: as for `check_destination`; only a dataset is ever replaced.
        """
        self.directory = Path(directory)
        self._shard_bytes = shard_bytes
        self._splits: dict[str, _Split] = {}
        self._serialize = example_serializer.ExampleSerializer(_FEATURES.get_serialized_info()).serialize_example
        self._check_destination = functools.partial(
            check_destination, self.directory, DATASET, overwrite=overwrite, sources=tuple(sources)
        )
        self._check_destination()

    def __enter__(self) -> "DatasetWriter":
        """Creates the temporary directory."""
        with self._as_input_error():
            self._made = partial_directory(self.directory)
            self._partial = self._made.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Removes an unfinished dataset."""
        for split in self._splits.values():
            # Closing releases the file. A lack of space was already reported by an earlier write.
            with suppress(RuntimeError):
                self._close_shard(split)
        self._made.__exit__(None, None, None)

    def add(self, split: str, record: Encoded, identifier: str) -> None:
        """Adds a record to a split.

        Args:
          record: int32 tokens [length] and bool mask [length].
          identifier: id of the source conversation or document.

        Raises:
          InputError: the record cannot be written, for lack of space or permission.
        """
        state = self._splits.setdefault(split, _Split())
        example = {"tokens": record.tokens, "loss_mask": record.loss_mask, "id": identifier}
        data = self._serialize(_FEATURES.encode_example(example))
        with self._as_input_error():
            if state.writer is None:
                path = self._shard_path(split, len(state.shard_lengths))
                state.writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
                state.shard_lengths.append(0)
                state.shard_bytes = 0
            state.writer.write(data)
            state.shard_lengths[-1] += 1
            state.shard_bytes += len(data)
            state.num_bytes += len(data)
            state.lengths.append(len(record.tokens))
            state.responses += int(record.loss_mask.sum())
            if state.shard_bytes >= self._shard_bytes:
                self._close_shard(state)

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Completes the dataset and moves it to its destination.

        Raises:
          InputError: the dataset cannot be written.
        """
        with self._as_input_error():
            infos = [self._finish_split(name, split) for name, split in self._splits.items()]
            tfds.folder_dataset.write_metadata(
                data_dir=self._partial,
                features=_FEATURES,
                split_infos=infos,
                filename_template=self._template(None),
                description="Conversations or texts as tokens, with a mask of the tokens to learn.",
                check_data=False,
            )
            summary = {name: self._summary(name, split) for name, split in self._splits.items()}
            content = {"format": FORMAT, **metadata, "splits": summary}
            (self._partial / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            self._check_destination()  # again, because writing may have taken hours
            put_in_place(self._partial, self.directory)

    def _close_shard(self, split: _Split) -> None:
        if split.writer is not None:
            writer, split.writer = split.writer, None
            writer.close()

    def _finish_split(self, name: str, split: _Split) -> splits.SplitInfo:
        """Gives the shards their final names, which include the number of shards."""
        self._close_shard(split)
        template = self._template(name)
        count = len(split.shard_lengths)
        for number in range(count):
            self._shard_path(name, number).rename(template.sharded_filepath(shard_index=number, num_shards=count))
        np.save(self._partial / _lengths_file(name), np.asarray(split.lengths, np.int32))
        return splits.SplitInfo(
            name=name, shard_lengths=split.shard_lengths, num_bytes=split.num_bytes, filename_template=template
        )

    def _summary(self, name: str, split: _Split) -> dict[str, Any]:
        files = sorted([*self._partial.glob(f"{NAME}-{name}.array_record-*"), self._partial / _lengths_file(name)])
        return {
            "records": len(split.lengths),
            "tokens": sum(split.lengths),
            "response_tokens": split.responses,
            "longest": max(split.lengths),
            "files": {path.name: path.stat().st_size for path in files},
        }

    def _template(self, split: str | None) -> naming.ShardedFileTemplate:
        return naming.ShardedFileTemplate(
            dataset_name=NAME, data_dir=self._partial, split=split, filetype_suffix="array_record"
        )

    def _shard_path(self, split: str, number: int) -> Path:
        return self._partial / f"{split}-{number}"

    @contextmanager
    def _as_input_error(self) -> Iterator[None]:
        """Turns a failed write into InputError."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).split(";")[0]
            raise InputError(
                f"cannot write the dataset {self.directory}: {reason}; nothing was kept: "
                "free some space or name another destination"
            ) from None


def _lengths_file(split: str) -> str:
    return f"lengths-{split}.npy"


_SPLIT = {"records": int, "tokens": int, "response_tokens": int, "longest": int, "files": dict[str, Any]}
_USED = {"vocab_size": int, "tokenizer": str | None, "language": str, "sources": tuple[str, ...] | None}


def read_metadata(directory: Path | str) -> dict[str, Any]:
    """Reads a dataset's metadata: template, max_tokens, tokenizer digest, seed, counts, splits and more.

    Returns:
      The metadata; `["splits"][name]` has records, tokens, response_tokens, longest (in tokens) and files (sizes).

    Raises:
      InputError: there is no such dataset, or it is incomplete.
    """
    path = Path(directory) / METADATA_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")  # which is refused below
    except OSError:
        raise InputError(
            f"{directory} is not a prepared dataset: it has no {METADATA_FILE}; make one with eabf prepare"
        ) from None
    fault = "damaged; prepare the dataset again"
    metadata = parse_json(text, path, fault)
    with reading(path, fault):
        if metadata["format"] != FORMAT:
            raise InputError(
                f"{path} has format {metadata['format']!r:.80}: this version reads {FORMAT}; prepare it again"
            )
        check({key: metadata[key] for key in _USED if key in metadata}, _USED, "key")
        for name, split in metadata["splits"].items():
            check({key: split[key] for key in ("records", "longest", "files")}, _SPLIT, "key", f"splits.{name}.")
            for file, size in split["files"].items():
                if Path(file).name != file or type(size) is not int:
                    raise ValueError(f"splits.{name}.files has {file!r:.80}: {size!r:.80}, expected names and sizes")
    return dict(metadata)


def num_records(directory: Path | str, split: str) -> int:
    """Counts the records of a split; raises InputError if there is no such dataset or split."""
    return int(_split_metadata(directory, split)["records"])


def record_lengths(directory: Path | str, split: str) -> Int32[np.ndarray, " records"]:
    """Reads the length of each record.

    Returns:
      int32 [records], in tokens.

    Raises:
      InputError: the dataset or split is missing or damaged.
    """
    expected = num_records(directory, split)
    path = Path(directory) / _lengths_file(split)
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise InputError(f"{path} is missing or damaged: prepare the dataset again") from None
    if lengths.shape != (expected,):
        raise InputError(f"{path} has shape {lengths.shape}, expected ({expected},): prepare the dataset again")
    return np.asarray(lengths, np.int32)


def _split_metadata(directory: Path | str, split: str) -> dict[str, Any]:
    known = read_metadata(directory)["splits"]
    if split not in known:
        raise unknown_name(f"split of {directory}", split, known)
    return dict(known[split])


class Records:
    """The records of one split, by number.

    A record is a dictionary: tokens int32 [length], loss_mask bool [length], id (a string).
    """

    def __init__(self, directory: Path | str, split: str):
        """Opens a split.

        Raises:
          InputError: there is no such dataset or split, or its files are missing, truncated or invalid.
        """
        self._directory = Path(directory)
        for name, size in _split_metadata(directory, split)["files"].items():
            path = self._directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise InputError(f"{path} {state}: prepare the dataset again")
        try:
            self._source = tfds.builder_from_directory(self._directory).as_data_source(split=split)
        # For damaged files, TFDS raises many types of errors.
        except Exception as error:
            raise InputError(f"{directory} cannot be opened: {_first_line(error)}; prepare the dataset again") from None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one record.

        Raises:
          IndexError: there is no such record.
          InputError: its bytes are damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._source[int(index)]
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"record {index} of {self._directory} is damaged: {_first_line(error)}; prepare the dataset again"
            ) from None
        return {
            "tokens": np.asarray(record["tokens"], np.int32),
            "loss_mask": np.asarray(record["loss_mask"], np.bool_),
            "id": record["id"].decode(),
        }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
