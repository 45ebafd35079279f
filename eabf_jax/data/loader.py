"""Makes training batches that are determined by a seed, split over processes, and resumable at any batch."""

import functools
from pathlib import Path
from typing import Any, Literal, get_args

import grain
import numpy as np

from eabf_jax.data.dataset import Records, record_lengths
from eabf_jax.errors import InputError, unknown_name

Mode = Literal["conversations", "packed"]

# Cache size for the documents that packed rows are cut from.
_CACHE_BYTES = 2**30
# Threads prefetch records: enough to hide decompression behind a step, and few enough for two cores.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def make_loader(
    directory: Path | str,
    split: str,
    *,
    batch_size: int,
    length: int,
    seed: int,
    epochs: int | None = None,
    mode: Mode = "conversations",
    samples: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Makes an iterator over batches.

    A batch is a dictionary of arrays [batch, length]: tokens int32, loss_mask bool (token t is predicted from the
    tokens before it), positions int32, segment_ids int32 (0 on padding). In mode "conversations" each row is one
    record, padded at the end. In mode "packed" the records of the split are joined in a shuffled order and cut into
    rows. Segments count from 1 in each row, positions restart in each segment, and all tokens except a segment's first
    are predicted. The last incomplete row of the split is dropped.

    Every epoch is a new shuffle of the rows, without its last incomplete batch. Each process gets `batch_size /
    process_count` rows; stacked in the order of the processes, they are the batch of a single process.

    The iterator's `get_state()` returns a JSON-serialisable dictionary. `set_state` of an iterator made with the same
    arguments resumes after the last batch taken.

    Args:
      directory: a dataset made by `eabf prepare`.
      split: "train" or "held_out".
      batch_size: rows per step over all processes.
      length: tokens per row.
      seed: 0 to 2**32 - 1.
      epochs: number of passes through the split; None for an endless iterator.
      mode: "conversations" or "packed".
      samples: number of records to use, from the first; None means all.

    Returns:
      A Grain iterator, with `get_state` and `set_state`.

    Raises:
      InputError: there is no such dataset, it has fewer records than `samples`, a record is longer than `length`, there
        are fewer rows than a batch, or the processes do not divide the batch.
    """
    if batch_size % process_count:
        raise InputError(f"batch size {batch_size} is not divisible by {process_count} processes: choose a multiple")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} is out of range: 0 to {2**32 - 1}")
    steps = steps_per_epoch(directory, split, batch_size=batch_size, length=length, mode=mode, samples=samples)
    records = Records(directory, split)
    if mode == "conversations":
        rows = grain.MapDataset.source(records)[:samples].map(functools.partial(_padded, length))
    else:
        rows = grain.MapDataset.source(_Packed(records, record_lengths(directory, split)[:samples], length, seed))
    # Rows are limited before batching, so that every process has the same number of batches. Each process takes every
    # process_count-th of these smaller batches, so that it reads no rows of other processes.
    batches = rows.shuffle(seed=seed)[: steps * batch_size].batch(batch_size // process_count)
    own = batches[process_index::process_count].repeat(epochs)
    return iter(own.to_iter_dataset(_READ_OPTIONS))


def resume(batches: grain.DatasetIterator[Any], state: Any, taken: int) -> None:
    """Moves a new iterator of `make_loader` to a saved position.

    Args:
      state: from `get_state()`.
      taken: number of batches that had been taken then.

    Raises:
      InputError: the state is damaged, or not that of so many batches.
    """
    expected = {"next_index": taken}  # Grain would take another place in the data without a word
    if state != expected:
        raise InputError(f"the position in the data is {state!r:.80}, expected {expected}")
    batches.set_state(state)


def steps_per_epoch(
    directory: Path | str, split: str, *, batch_size: int, length: int, mode: Mode, samples: int | None = None
) -> int:
    """Counts the complete batches of an epoch; the arguments are those of `make_loader`.

    Raises:
      InputError: there is no such dataset, it has fewer records than `samples`, a record is longer than `length` (in
        mode "conversations"), or there are fewer rows than a batch.
    """
    if mode not in get_args(Mode):
        raise unknown_name("loader mode", mode, get_args(Mode))
    if batch_size < 1 or length < 1:
        raise InputError(f"batch size {batch_size}, length {length}: both must be at least 1")
    lengths = record_lengths(directory, split)
    if samples is not None and not 1 <= samples <= len(lengths):
        raise InputError(
            f"split {split!r} of {directory} has {len(lengths)} records, and {samples} samples are asked for: prepare "
            "more, or use fewer"
        )
    lengths = lengths[:samples]
    if mode == "conversations":
        rows, longest = len(lengths), int(lengths.max(initial=0))
        if longest > length:
            raise InputError(
                f"split {split!r} of {directory} has records of {longest} tokens, but rows have {length}: "
                f"prepare with --max-tokens {length}, or train at a length of {longest}"
            )
    else:
        rows = int(lengths.sum()) // length
    if rows < batch_size:
        unit = "records" if mode == "conversations" else f"rows of {length} tokens"
        raise InputError(
            f"split {split!r} of {directory} has {rows} {unit}, fewer than one batch of {batch_size}: "
            "prepare more, or choose a smaller batch"
        )
    return rows // batch_size


def _padded(length: int, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Pads a record to a row."""
    row = _empty_row(length)
    _fill(row, 0, record["tokens"], record["loss_mask"], segment=1)
    return row


class _Packed:
    """The rows of all joined records; only lengths are needed to find a record's place."""

    def __init__(self, records: Records, lengths: np.ndarray, length: int, seed: int):
        self._length = length
        # A long document spans many rows; the cache reads it only once, if memory allows.
        kept = max(1, int(_CACHE_BYTES / (4 * lengths.mean())))
        self._tokens = functools.lru_cache(maxsize=kept)(lambda number: records[number]["tokens"])
        self._order = np.random.default_rng(seed).permutation(len(lengths))
        self._ends = np.cumsum(lengths[self._order], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = _empty_row(self._length)
        begin = index * self._length
        filled = 0
        document = int(np.searchsorted(self._ends, begin, side="right"))
        segment = 0
        while filled < self._length:
            tokens = self._tokens(int(self._order[document]))
            start = begin + filled - (int(self._ends[document]) - len(tokens))
            part = tokens[start : start + self._length - filled]
            segment += 1
            _fill(row, filled, part, np.arange(len(part)) > 0, segment)
            filled += len(part)
            document += 1
        return row


def _empty_row(length: int) -> dict[str, Any]:
    return {
        "tokens": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, np.bool_),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }


def _fill(row: dict[str, np.ndarray], begin: int, tokens: np.ndarray, loss_mask: np.ndarray, segment: int) -> None:
    place = slice(begin, begin + len(tokens))
    row["tokens"][place] = tokens
    row["loss_mask"][place] = loss_mask
    row["positions"][place] = np.arange(len(tokens))
    row["segment_ids"][place] = segment
