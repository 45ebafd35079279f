"""Reads and writes safetensors files one tensor at a time, without mapping them into memory.

The safetensors library maps whole files, whose pages count as the process's memory, and can only write tensors that are
all in memory. A 70B model on a small machine allows neither. The format is a length, a JSON header and raw
little-endian data.
Source: the format's description in huggingface/safetensors.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import write_json
from eabf_jax.reading import parse_json, reading

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The safetensors library has the same limit.
MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Old checkpoints hold masks and positions of these types, beside the weights.
_BUFFER_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{letter}{8 * size}": np.dtype(f"{kind}{size}") for letter, kind in ("Ii", "Uu") for size in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: name, element type and shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(PlannedTensor):
    """A tensor in a file; `offset` is the position of its first byte in the file."""

    path: Path
    offset: int

    def read(self) -> np.ndarray:
        """Reads the tensor.

        Raises:
          InputError: the file ends before the tensor does.
        """
        # As bytes first, because np.fromfile does not know the dtypes of ml_dtypes.
        raw = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if raw.size != self.nbytes:
            raise InputError(f"{self.path}: truncated inside tensor {self.name}")
        return raw.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file, and checks it against the file's size.

    Returns:
      Tensor by name.

    Raises:
      InputError: the file is missing, truncated or not safetensors, or has tensors of an unknown type.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a shard of the weights there")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: not a whole safetensors file: it has {size} bytes, its header claims {length}; copy it again"
            )
        text = file.read(length)
    fault = "the safetensors header is not valid"
    header = parse_json(text, path, fault)
    with reading(path, fault):
        tensors = {
            name: _stored(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        what = "truncated" if size < end else "too long"
        raise InputError(f"{path}: {what}: {size} bytes, its header describes {end}; copy it again")
    return tensors


def _stored(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype = (DTYPES | _BUFFER_DTYPES).get(entry["dtype"])
    if dtype is None:
        raise InputError(f"{path}: tensor {name} is {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
        raise InputError(
            f"{path}: tensor {name} has shape {entry['shape']!r:.80} and data_offsets "
            f"{entry['data_offsets']!r:.80}, expected whole numbers from 0"
        )
    tensor = StoredTensor(name, dtype, tuple(entry["shape"]), path, data_start + begin)
    if end - begin != tensor.nbytes:
        raise InputError(
            f"{path}: tensor {name} of shape {list(tensor.shape)} {entry['dtype']} takes {tensor.nbytes} bytes, "
            f"its header gives it {end - begin}"
        )
    return tensor


def write_sharded(
    directory: Path, planned: Sequence[PlannedTensor], tensors: Iterable[np.ndarray], max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or model-00001-of-0000N.safetensors … and their index, holding one tensor at a time.

    Args:
      planned: the tensors to write, in order.
      tensors: their arrays in the same order; consumed one by one.
      max_shard_bytes: largest size of a shard's data; a larger tensor gets its own shard.
    """
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    arrays = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, arrays)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        write_json(directory / INDEX_FILE, index)


def _write_file(path: Path, planned: Sequence[PlannedTensor], tensors: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in planned:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in planned:
            array = next(tensors)
            assert array.dtype == tensor.dtype and array.shape == tensor.shape, tensor.name
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
