"""Reads GGUF files: their parts, byte order, metadata and tensors."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import refuse_pointer
from eabf_jax.reading import reading

DOCUMENTATION = "docs/gguf.md"

# llama.cpp's names for the parts of a split file; only the first part has the model's metadata.
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")

# The largest vocabularies have 262,144 tokens and twice as many merges. Each string costs several objects.
MAX_STRINGS = 2_000_000

_REQUIRED = object()


class Kind(NamedTuple):
    """A condition on a metadata value, in words and as a test."""

    needed: str
    fits: Callable[[Any], bool]


def _array_of(item: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(entry) is item for entry in value)


def only(needed: str, *values: Any) -> Kind:
    """Returns the kind of a key that is supported only with these values."""
    return Kind(needed, lambda value: value in values)


COUNT = Kind("a whole number above 0", lambda value: type(value) is int and value > 0)
NUMBER = Kind("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
FLAG = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("a string", lambda value: type(value) is str)
TEXTS = Kind("an array of strings", _array_of(str))
WHOLE_NUMBERS = Kind("an array of whole numbers", _array_of(int))
NUMBERS = Kind("an array of numbers", lambda value: isinstance(value, list) and all(map(NUMBER.fits, value)))


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, or all parts of a split one.

    Attributes:
      path: the file that the user named.
      metadata: values by key.
      tensors: tensors by name, as read by the gguf package.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def error(self, message: str) -> InputError:
        """Returns an error that names the file."""
        return InputError(f"{self.path}: {message}")

    def value(self, key: str, kind: Kind, default: Any = _REQUIRED) -> Any:
        """Reads one metadata value.

        Args:
          default: the value if the file lacks the key; without it, the key is required.

        Raises:
          InputError: the key is missing, or its value is of another kind.
        """
        if key not in self.metadata:
            if default is _REQUIRED:
                raise self.error(f"metadata has no {key}; expected {kind.needed}")
            return default
        found = self.metadata[key]
        if not kind.fits(found):
            raise self.error(f"{key} is {shown(found)}, expected {kind.needed}")
        return found

    def refuse_unknown(self, prefix: str, known: Collection[str]) -> None:
        """Refuses unknown metadata, because it might change what the model computes.

        Args:
          prefix: of the keys to check.
          known: the keys that are read or harmless.

        Raises:
          InputError: there is another key.
        """
        for key, value in self.metadata.items():
            if key.startswith(prefix) and key not in known:
                raise self.error(
                    f"metadata key {key} (value {shown(value)}) is not understood; expected one that "
                    f"{DOCUMENTATION} lists"
                )


def shown(value: Any) -> str:
    """Formats a metadata value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_gguf(src: Path | str) -> GgufFile:
    """Reads the metadata of a GGUF file and finds its tensors, in all parts of a split file.

    Args:
      src: the .gguf file, or any part of a split one.

    Raises:
      InputError: the file is incomplete or not GGUF, a part is missing or belongs to another file, or quantised
        weights are in another byte order.
    """
    path = Path(src)
    metadata, tensors = _read_part(path)
    count = metadata.get("split.count", 1)
    if count in (0, 1):
        return GgufFile(path, metadata, tensors)
    name = PART_NAME.fullmatch(path.name)
    if name is None or int(name["parts"]) != count:
        raise InputError(
            f"{path}: one of {count} parts (split.count), but it is not named NAME-00001-of-{count:05d}.gguf; "
            "rename the parts, or merge them with `llama-gguf-split --merge`"
        )
    metadata, tensors = {}, {}
    for index in range(count):
        part = path.with_name(f"{name['stem']}-{index + 1:05d}-of-{count:05d}.gguf")
        values, found = _read_part(part)
        if (values.get("split.no"), values.get("split.count")) != (index, count):
            raise InputError(
                f"{part}: split.no is {values.get('split.no')} and split.count {values.get('split.count')}, "
                f"expected {index} and {count}"
            )
        if twice := sorted(tensors.keys() & found.keys()):
            raise InputError(f"{part}: tensor {twice[0]} is in an earlier part too; expected each tensor once")
        metadata, tensors = metadata or values, tensors | found
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InputError(f"{path}: the {count} parts hold {len(tensors)} tensors, expected {expected}")
    return GgufFile(path, metadata, tensors)


def dequantised(file: GgufFile, name: str) -> np.ndarray:
    """Reads one tensor as float32, in NumPy's order of dimensions (the reverse of GGUF's).

    Raises:
      InputError: the gguf package cannot dequantise it.
    """
    tensor = file.tensors[name]
    data = tensor.data.astype(tensor.data.dtype.newbyteorder("="), copy=False)
    try:
        return gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise file.error(
            f"tensor {name} is quantised as {tensor.tensor_type.name}, which the gguf package does not dequantise"
        ) from error


def shortest(value: float) -> float:
    """Returns the shortest decimal with the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Reader(gguf.GGUFReader):
    """The package's reader, which takes a file's numbers as they are, with checks against the file's size."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, before the value at byte {int(offset):,}")
        return super()._get(offset, dtype, count, *rest, **named)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        """Reads a value; the package makes several objects for each number of an array, and this one view of all."""
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        header = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, count = gguf.GGUFValueType(header[0][0]), int(header[1][0])
        if item == gguf.GGUFValueType.ARRAY:
            raise ValueError("it has an array of arrays, expected arrays of numbers or strings")
        if item == gguf.GGUFValueType.STRING:
            room = (len(self.data) - orig_offs - 12) // 8  # a string has at least its length
            if count > min(room, MAX_STRINGS):
                raise ValueError(f"an array of {count:,} strings at byte {orig_offs:,}, with room for {room:,}")
            return super()._get_field_parts(orig_offs, raw_type)
        values = self._get(orig_offs + 12, self.gguf_scalar_to_np[item], count)
        return 12 + int(values.nbytes), [*header, values], [2], [gguf.GGUFValueType.ARRAY, item]


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a .gguf file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .gguf file")
    refuse_pointer(path)
    try:
        with reading(path, "not a whole GGUF file"):
            reader = _Reader(path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if reader.byte_order == "S":
        for name, tensor in tensors.items():
            # Writers disagree on whether the scales inside a block are swapped too; only plain floats are unambiguous.
            if tensor.data.dtype.itemsize == 1:
                raise InputError(
                    f"{path}: a {reader.endianess.name.lower()}-endian file whose tensor {name} is "
                    f"{tensor.tensor_type.name}; expected F32 or F16, or a file in this machine's byte order"
                )
    return metadata, tensors
