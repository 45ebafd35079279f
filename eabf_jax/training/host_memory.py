"""Arrays that wait in host memory: moving them, stacking them there, and the optimizer's state on its way through."""

import math
from collections import deque
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import Array

HOST = "pinned_host"
# Layers whose part of what lies in host memory is on its way at a time, one way.
IN_FLIGHT = 3


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same sharding in the memory of the devices' hosts."""
    return sharding.with_memory_kind(HOST)


def moved(tree: Any, shardings: Any) -> Any:
    """Copies arrays to another memory; where they were is free as soon as that is done.

    Args:
      tree: arrays; they cannot be used any more.
      shardings: where to, in the same places.

    Returns:
      The copies.
    """
    copies = jax.device_put(tree, shardings)
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    return copies


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a tree take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


class Streamed:
    """The optimizer's state, part by part, on its way from host memory to its update and back.

    A copy to the device starts when all computation that was queued before it is done. So parts are asked for between
    the layers of the last backward pass, as fast as these make room, and the first ones are there when it ends; the
    last ones leave while the next step begins.
    """

    def __init__(self, parts: list[Any], on_device: list[Any], on_host: list[Any]):
        """Takes the state.

        Args:
          parts: trees of arrays in host memory, in the order of their update.
          on_device: their shardings on the device.
          on_host: their shardings in host memory.
        """
        self._sizes = [device_bytes(part) for part in parts]
        self._waiting, self._targets, self._homes = deque(parts), deque(on_device), deque(on_host)
        self._coming: deque[Any] = deque()
        self._leaving: deque[tuple[Any, int]] = deque()
        self._next = 0
        self._room = 0
        self.granted = 0

    def grant(self, size: int) -> None:
        """Tells of so many more bytes of the device's memory that parts may take."""
        self.granted += size
        self._room += size
        while self._waiting and self._room >= self._sizes[self._next]:
            self._fetch()

    def grant_least(self) -> None:
        """Makes sure that some parts can be on their way each way, and one at its update."""
        self.grant(max(0, (2 * IN_FLIGHT + 1) * max(self._sizes) - self.granted))

    def _fetch(self) -> None:
        self._room -= self._sizes[self._next]
        self._next += 1
        self._coming.append(moved(self._waiting.popleft(), self._targets.popleft()))

    def take(self) -> Any:
        """The next part, on the device."""
        while not self._coming:
            self._settle_one()
        return self._coming.popleft()

    def give(self, part: Any) -> Any:
        """Sends an updated part home; returns it as it will lie there."""
        size = device_bytes(part)
        parked = moved(part, self._homes.popleft())
        self._leaving.append((parked, size))
        return parked

    def settle(self, size: float) -> None:
        """Waits until no more than so many bytes of parts are still on the device on their way home."""
        while sum(bytes_ for _, bytes_ in self._leaving) > size:
            self._settle_one()

    def _settle_one(self) -> None:
        parked, size = self._leaving.popleft()
        jax.block_until_ready(parked)
        self._room += size
        self.grant(0)


class Shards:
    """The parts of an array that this process holds, in NumPy: a leaf to JAX, by device."""

    def __init__(self, array: Array):
        self.shape = array.shape
        self.by_device = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


def stacked(at: NamedSharding, *layers: Shards) -> Array:
    """One array from those of all layers, stacked in host memory.

    Args:
      at: where it is to lie.
      layers: the layers' arrays, each sharded as `at` but for the leading axis.

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


def layer_of(leaf: Array, number: int, at: NamedSharding) -> Array:
    """One layer of a stacked array, on the device.

    Args:
      leaf: [layers, ...], on the device or in host memory.
      number: the layer.
      at: where it is to lie.

    Returns:
      The layer's array.
    """
    if leaf.sharding.memory_kind != HOST:
        return jax.device_put(leaf[number], at)
    pieces = [jax.device_put(np.asarray(shard.data)[number], shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape[1:], at, pieces)
