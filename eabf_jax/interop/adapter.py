"""Runs that hold only adapters: their description, and merging them into their base model.

In model.json of such a run, the object `adapter` has the keys of the configuration's `lora`, the directory of the base
model and a digest of that model.
"""

import dataclasses
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.fields import check, types_of
from eabf_jax.interop import native
from eabf_jax.interop.directory import read_json_object
from eabf_jax.interop.safetensors_stream import DTYPES, NAMES, StoredTensor
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora, adapters, merged_kernel
from eabf_jax.model.parameters import Parameter, parameters
from eabf_jax.reading import prefixed, reading


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """A stacked parameter that reads each layer when it is indexed."""

    read: Callable[[slice], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.read(slice(layer, layer + 1))[0]


class Leaves(NamedTuple):
    """A stored model whose parameters are read one at a time, each by its path of keys.

    Where a method takes a dtype, None keeps the stored one.
    """

    config: LlamaConfig
    dtypes: Mapping[tuple[str, ...], np.dtype[Any]]  # as stored
    reader: Callable[[tuple[str, ...], Any, slice], np.ndarray]  # (path, dtype, layers) -> in host memory; see `read`
    # (path, dtype, sharding) -> on its devices; given if each process can read only its own parts
    restore: Callable[[tuple[str, ...], Any, jax.sharding.Sharding], jax.Array] | None = None

    def read(self, path: tuple[str, ...], dtype: Any = None, layers: slice = slice(None)) -> np.ndarray:
        """Reads a parameter, or some layers of a stacked one, into host memory."""
        gc.collect(0)  # makes JAX release host memory that it has copied, such as the previous parameter's
        return self.reader(path, dtype, layers)

    def by_layer(self, path: tuple[str, ...], dtype: Any = None) -> ByLayer:
        """Opens a stacked parameter, to read its layers one by one."""
        return ByLayer(functools.partial(self.read, path, dtype))

    def tensors(self, entry: Parameter) -> Iterator[np.ndarray]:
        """Yields a parameter layer by layer, in the shape of a Hugging Face or GGUF file."""
        leaf = self.by_layer(entry.path) if entry.layers else [self.read(entry.path)]
        for own in map(leaf.__getitem__, range(entry.layers or 1)):
            yield own.T if entry.transposed else own

    def place(self, path: tuple[str, ...], dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        """Reads a parameter straight to its devices; returns when host memory no longer holds it."""
        if self.restore is not None:
            return self.restore(path, dtype or self.dtypes[path], sharding)
        leaf = self.read(path, dtype)
        # Slicing in host memory means that no device holds the whole array.
        return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The description of adapters in model.json."""

    lora: Lora
    base: str  # directory of the base model
    base_digest: str  # from `digest`

    def to_json(self) -> dict[str, Any]:
        """Returns the object for model.json."""
        return {**dataclasses.asdict(self.lora), "base": self.base, "base_digest": self.base_digest}


def read_adapter(directory: Path | str) -> Adapter | None:
    """Reads the description of adapters in model.json; None if the directory holds a complete model.

    Raises:
      InputError: model.json is missing, or its description is invalid.
    """
    path = Path(directory) / native.MODEL_FILE
    found = read_json_object(path).get(native.ADAPTER)
    if found is None:
        return None
    try:
        with reading(path, "not the description of adapters"):
            return _adapter(found)
    except InputError as error:
        raise prefixed(path, error) from error


def _adapter(found: Any) -> Adapter:
    types = {**types_of(Lora), "base": str, "base_digest": str}
    # Every key is required, because a default would only be a guess at what the run trained.
    told = check(found, types, "key", f"{native.ADAPTER}.", required=types)
    base, base_digest = told.pop("base"), told.pop("base_digest")
    return Adapter(Lora(**told), base, base_digest)


def digest(model: Leaves) -> str:
    """Computes a digest of a model from the shapes of its parameters and the scales of its norms.

    Returns:
      16 hexadecimal digits, the same for a native and a Hugging Face directory of the model.
    """
    entries = parameters(model.config)
    found = hashlib.sha256(json.dumps([[entry.path, entry.shape] for entry in entries]).encode())
    for entry in entries:
        if entry.path[-1] == "scale":
            found.update(np.ascontiguousarray(model.read(entry.path, np.float32)).tobytes())
    return found.hexdigest()[:16]


def check_shape(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    """Raises InputError if a stored tensor has another shape, or is not floating point."""
    if tensor.dtype not in NAMES:
        raise InputError(f"{tensor.path}: tensor {tensor.name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    if tensor.shape != expected:
        raise InputError(
            f"{tensor.path}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}"
        )


def stack(entry: Parameter, found: Mapping[str, StoredTensor], dtype: Any, layers: slice) -> np.ndarray:
    """Reads the Hugging Face tensors of one parameter, or of some of its layers, into one new array.

    Args:
      found: stored tensor by Hugging Face name.
    """
    stored = [found[name] for name in entry.hf_names()[layers]]
    leaf = native.empty_leaf((len(stored), *entry.unstacked), dtype)
    for target, tensor in zip(leaf, stored, strict=True):
        target[...] = tensor.read().T if entry.transposed else tensor.read()  # no variable keeps a second tensor alive
    return leaf[0] if entry.layers is None else leaf


def merged_run(directory: Path | str, adapter: Adapter, base: Leaves, step: int | None = None) -> Leaves:
    """Merges the adapters of a run into their base model.

    Args:
      step: the run's checkpoint; None for the latest.

    Returns:
      The model with the run's window and scheme. Parameters that the run changed are float32, because a few steps
      change less than the last bit of a bfloat16 kernel.

    Raises:
      InputError: the base is another model; or the checkpoint is missing, damaged or of other adapters.
    """
    config = native.read_model_json(directory)
    found = digest(base)
    if found != adapter.base_digest:
        raise InputError(
            f"the base model is not the one that the adapters in {directory} were trained on: its digest is {found}, "
            f"expected {adapter.base_digest}"
        )
    path = native.checkpoint_path(directory, step)
    lora = adapter.lora
    entries = (*parameters(config), *adapters(config, lora))
    own = native.stored_arrays(path, {entry.path: entry.shape for entry in entries if lora.trains(entry.path)})
    return merged(config, base, own, functools.partial(native.read_leaf, path), lora.scale)


def merged(
    config: LlamaConfig,
    base: Leaves,
    own: Collection[tuple[str, ...]],
    read_own: Callable[[tuple[str, ...], Any, slice], np.ndarray],
    scale: float = 1.0,
) -> Leaves:
    """Merges low-rank adapters and whole parameters into a base model.

    Args:
      config: of the merged model.
      own: the paths of what is merged: parameters of the model, which replace the base's, and `lora_a` and `lora_b`.
      read_own: reads one of them, as `Leaves.reader` does.
      scale: the factor on the product of `lora_a` and `lora_b`.
    """
    adapted = {name for name in base.dtypes if name[-1] in ("kernel", "embedding") and (*name[:-1], "lora_a") in own}

    def read(name: tuple[str, ...], dtype: Any, layers: slice) -> np.ndarray:
        source = read_own if name in own else base.read
        if name not in adapted:
            return source(name, dtype, layers)
        first, second = (read_own((*name[:-1], leaf), None, layers) for leaf in ("lora_a", "lora_b"))
        kernel = merged_kernel(source(name, None, layers), first, second, scale)
        return kernel.astype(dtype or kernel.dtype, copy=False)

    changed = dict.fromkeys(adapted | (set(own) & base.dtypes.keys()), np.dtype(np.float32))
    return Leaves(config, {**base.dtypes, **changed}, read)
