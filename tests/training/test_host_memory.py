import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.training.host_memory import (
    IN_FLIGHT,
    OptimizerStream,
    Shards,
    device_bytes,
    layer_of,
    moved,
    on_host,
    stacked,
)

PARTS, SIZE = 12, 1024  # bytes per part


@pytest.fixture(scope="module")
def at():
    return NamedSharding(make_mesh(MeshConfig(), jax.devices()[:4]), PartitionSpec("fsdp"))


@pytest.fixture
def streamed(at):
    parts = [
        [jax.device_put(jnp.full((SIZE,), number, jnp.float32), on_host(at)) for number in range(PARTS)][i : i + 1]
        for i in range(PARTS)
    ]
    return OptimizerStream(parts, [[at]] * PARTS, [[on_host(at)]] * PARTS), parts


def on_device(stream):
    return len(stream._arriving) + len(stream._leaving)


def test_bytes_are_those_of_one_device(at):
    arrays = [jax.device_put(jnp.zeros((8, 6), jnp.bfloat16), at), jax.device_put(jnp.zeros(4, jnp.int8), at)]
    assert device_bytes(arrays) == 2 * 6 * 2 + 1


def test_moving_frees_where_an_array_was(at):
    array = jax.device_put(jnp.arange(8.0), at)
    copy = moved([array], [on_host(at)])[0]
    assert array.is_deleted()
    assert copy.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(copy, np.arange(8.0))


def test_parts_come_as_room_is_granted_and_no_sooner(streamed):
    stream, parts = streamed
    stream.grant(SIZE - 1)
    assert on_device(stream) == 0
    stream.grant(1)
    assert on_device(stream) == 1 and parts[0][0].is_deleted() and not parts[1][0].is_deleted()
    stream.grant(2 * SIZE + 5)
    assert on_device(stream) == 3 and stream.granted == 3 * SIZE + 5
    stream.grant_least()
    assert on_device(stream) == 2 * IN_FLIGHT + 1
    stream.grant_least()
    assert on_device(stream) == 2 * IN_FLIGHT + 1


@pytest.mark.parametrize("granted", [SIZE, 5 * SIZE, 100 * SIZE])
def test_every_part_passes_once_in_order_within_the_room(streamed, granted):
    stream, _ = streamed
    stream.grant(granted)
    for number in range(PARTS):
        part = stream.take()
        assert part[0].sharding.memory_kind == "device"
        np.testing.assert_array_equal(part[0], number)
        home = stream.give([part[0] + 1])
        assert home[0].sharding.memory_kind == "pinned_host"
        np.testing.assert_array_equal(home[0], number + 1)
        assert on_device(stream) <= max(granted // SIZE, 1)
    stream.drain(2.5 * SIZE)
    assert on_device(stream) <= 2
    stream.drain(0)
    assert on_device(stream) == 0


def test_stacking_and_taking_apart_are_inverse(at):
    layers = [np.random.default_rng(i).normal(size=(8, 3)).astype(np.float32) for i in range(3)]
    whole = NamedSharding(at.mesh, PartitionSpec(None, "fsdp"))
    for place in (whole, on_host(whole)):
        array = stacked(place, *(Shards(jax.device_put(layer, at)) for layer in layers))
        assert array.sharding == place
        np.testing.assert_array_equal(array, np.stack(layers))
        for number, layer in enumerate(layers):
            found = layer_of(array, number, at)
            assert found.sharding.memory_kind == "device"
            np.testing.assert_array_equal(found, layer)
