"""GGUF files as they lie on the disk: their parts, their byte order, their metadata and their tensors."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from eabf_jax.errors import InputError, one_line

DOCUMENTATION = "docs/gguf.md"

# How llama.cpp names the parts of a split file, of which only the first has the model's metadata.
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")

_REQUIRED = object()


class Kind(NamedTuple):
    """What a metadata value must be: in words, and as a test."""

    needed: str
    fits: Callable[[Any], bool]


def _array_of(item: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(entry) is item for entry in value)


def only(needed: str, *values: Any) -> Kind:
    """The kind of a key that asks for what is not implemented, unless it has one of these values."""
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
      path: the file as the user named it.
      metadata: its values by key.
      tensors: its tensors by name, as the gguf package reads them.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def error(self, message: str) -> InputError:
        """An error that names the file, to be raised by the caller."""
        return InputError(f"{self.path}: {message}")

    def value(self, key: str, kind: Kind, default: Any = _REQUIRED) -> Any:
        """Reads one metadata value.

        Args:
          kind: what the value must be.
          default: what the file means where it has no such key; left out for a key that it must have.

        Raises:
          InputError: no such key, or a value of another kind.
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
        """Refuses metadata that nobody looks at: it might change what the model computes.

        Args:
          prefix: of the keys to check.
          known: the keys that are read or known to be harmless.

        Raises:
          InputError: a key that is neither.
        """
        for key, value in self.metadata.items():
            if key.startswith(prefix) and key not in known:
                raise self.error(
                    f"metadata key {key} (value {shown(value)}) is not understood; expected those that {DOCUMENTATION} "
                    "lists"
                )


def shown(value: Any) -> str:
    """A metadata value in a message: arrays and long texts cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_gguf(src: Path | str) -> GgufFile:
    """Reads the metadata of a GGUF file and finds its tensors; of a split file, those of all parts.

    Args:
      src: the .gguf file, or any part of a split one.

    Raises:
      InputError: not a whole GGUF file, a part that is missing or belongs elsewhere, quantised weights in another
        machine's byte order.
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
            "name the parts so, or merge them with `llama-gguf-split --merge`"
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
    """Reads one tensor as float32, in the shape that numpy gives it (GGUF's reversed).

    Raises:
      InputError: a quantisation that the gguf package does not undo.
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
    """The shortest decimal that is the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Reader(gguf.GGUFReader):
    """The package's reader, which takes what lies behind the end of a file for empty and may then read on for ever."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, before what should follow at {int(offset):,}")
        return super()._get(offset, dtype, count, *rest, **named)


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if path.is_dir():
        raise InputError(f"{path}: a directory; expected a .gguf file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .gguf file")
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: not a whole GGUF file: {one_line(error)}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if reader.byte_order == "S":
        for name, tensor in tensors.items():
            # Writers disagree on whether the scales inside a block are swapped too; plain floats are never in doubt.
            if tensor.data.dtype.itemsize == 1:
                raise InputError(
                    f"{path}: a {reader.endianess.name.lower()}-endian file whose tensor {name} is "
                    f"{tensor.tensor_type.name}; expected F32 or F16 in one, or this machine's byte order"
                )
    return metadata, tensors
