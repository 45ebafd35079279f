"""Arrays in host memory: moving them, stacking them there, and streaming the optimizer's state through the device."""

import math
from collections import deque
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array

HOST = "pinned_host"
# Number of layers whose arrays are in transfer at a time, per direction.
IN_FLIGHT = 3


def on_host(sharding: NamedSharding) -> NamedSharding:
    """Returns the same sharding in the memory of the devices' hosts."""
    return sharding.with_memory_kind(HOST)


def moved(tree: Any, shardings: Any) -> Any:
    """Copies arrays to another memory and deletes them, which frees their memory as soon as the copy is done.

    Args:
      tree: arrays; unusable afterwards.
      shardings: shardings of the copies, in a tree of the same structure.
    """
    copies = jax.device_put(tree, shardings)
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    return copies


def device_bytes(tree: Any) -> int:
    """Returns the bytes that the arrays of a tree take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


class OptimizerStream:
    """Streams the optimizer's state, part by part, from host memory to its update and back.

    A copy to the device starts only when all computation queued before it is done. Copies are therefore queued between
    the layers of the last backward pass, as these layers free memory. The first parts have arrived when that pass ends;
    the last parts leave while the next step begins.
    """

    def __init__(self, parts: list[Any], on_device: list[Any], on_host: list[Any]):
        """Takes the parts of the state.

        Args:
          parts: trees of arrays in host memory, in the order of their update.
          on_device: the shardings of each part on the device.
          on_host: the shardings of each part in host memory.
        """
        sizes = [device_bytes(part) for part in parts]
        self._waiting = deque(zip(parts, sizes, on_device, strict=True))
        self._on_host = deque(on_host)
        self._arriving: deque[Any] = deque()
        self._leaving: deque[tuple[Any, int]] = deque()
        self._largest = max(sizes)
        self._free = 0  # of the granted bytes
        self.granted = 0

    def grant(self, size: int) -> None:
        """Grants the parts `size` more bytes of device memory, and starts the copies that now fit."""
        self.granted += size
        self._fetch(size)

    def grant_least(self) -> None:
        """Raises the grant to the minimum: `IN_FLIGHT` parts in transfer each way, and one part in its update."""
        self.grant(max(0, (2 * IN_FLIGHT + 1) * self._largest - self.granted))

    def _fetch(self, freed: int) -> None:
        self._free += freed
        while self._waiting and self._free >= self._waiting[0][1]:
            part, size, at = self._waiting.popleft()
            self._free -= size
            self._arriving.append(moved(part, at))

    def take(self) -> Any:
        """Returns the next part, on the device."""
        while not self._arriving:
            self._drain_one()
        return self._arriving.popleft()

    def give(self, part: Any) -> Any:
        """Starts the copy of an updated part to host memory; returns the copy."""
        size = device_bytes(part)
        copy = moved(part, self._on_host.popleft())
        self._leaving.append((copy, size))
        return copy

    def drain(self, size: float) -> None:
        """Waits until the parts still being copied to host memory take at most `size` bytes on the device."""
        while sum(bytes_ for _, bytes_ in self._leaving) > size:
            self._drain_one()

    def _drain_one(self) -> None:
        copy, size = self._leaving.popleft()
        jax.block_until_ready(copy)
        self._fetch(size)


class Shards:
    """The shards of an array that this process holds, as NumPy arrays by device; JAX treats the object as a leaf."""

    def __init__(self, array: Array):
        self.shape = array.shape
        self.by_device = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


def stacked(at: NamedSharding, *layers: Shards) -> Array:
    """Stacks the arrays of all layers in host memory and places the result.

    Args:
      at: sharding of the result.
      layers: the layers' arrays, each sharded as `at` without its leading axis.

    Returns:
      The array [layers, ...].
    """
    pieces = [
        jax.device_put(
            np.stack([layer.by_device[device] for layer in layers]),
            SingleDeviceSharding(device, memory_kind=at.memory_kind),
        )
        for device in layers[0].by_device
    ]
    return jax.make_array_from_single_device_arrays((len(layers), *layers[0].shape), at, pieces)


def layer_of(leaf: Array, index: int, at: NamedSharding) -> Array:
    """Copies one layer of a stacked array to the device.

    Args:
      leaf: [layers, ...], on the device or in host memory.
      index: 0-based layer index.
      at: sharding of the result.
    """
    if leaf.sharding.memory_kind != HOST:
        return jax.device_put(leaf[index], at)
    pieces = [jax.device_put(np.asarray(shard.data)[index], shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape[1:], at, pieces)
