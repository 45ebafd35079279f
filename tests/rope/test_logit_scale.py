"""The entropy-aware multiplier against ln(i)/ln(c) in float64, and where it must be exactly 1."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eabf_jax.rope import logit_scale, scheme

# A quotient, a logarithm, the constant 1 / ln c, a product and a sum are each rounded to float32, by 2^-24 relative at
# most (the logarithm by twice that); the first four weigh only where t is well above 1 (1.02 * 2^-24 measured for
# c = 4,096).
TOLERANCE = 6 * 2.0**-24


def reference(position: int, layer: int, window: int, unscaled_layers: int) -> float:
    return 1.0 if layer < unscaled_layers else max(math.log(position + 1) / math.log(window), 1.0)


@pytest.mark.parametrize("window", [2, 512, 4096, 8192])
def test_every_position_agrees_with_the_formula(window: int) -> None:
    positions = np.arange(131_072)
    found = logit_scale.entropy_aware(jnp.asarray(positions), 2, pretrained_window=window)
    expected = np.maximum(np.log(positions + 1.0) / np.log(float(window)), 1.0)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=TOLERANCE)


@settings(max_examples=100, deadline=None)
@given(
    position=st.integers(0, 1_000_000),
    layer=st.integers(0, 40),
    window=st.integers(2, 131_072),
    unscaled_layers=st.integers(0, 5),
)
def test_any_parameters_agree_with_the_formula(position: int, layer: int, window: int, unscaled_layers: int) -> None:
    s = scheme("eabf", pretrained_window=window, unscaled_layers=unscaled_layers)
    found = float(s.logit_scale(jnp.int32(position), layer))
    assert found == pytest.approx(reference(position, layer, window, unscaled_layers), rel=TOLERANCE)


def test_values_by_hand() -> None:
    # ln 16384 / ln 4096 = 14/12 and ln 2^24 / ln 2^12 = 2
    s = scheme("eabf", pretrained_window=4096)
    found = s.logit_scale(jnp.array([0, 4095, 16_383, 2**24 - 1]), 2)
    np.testing.assert_allclose(found, [1.0, 1.0, 14 / 12, 2.0], rtol=TOLERANCE)


@pytest.mark.parametrize("window", [2, 100, 4096, 8192])
def test_exactly_one_within_the_pretrained_window_and_more_right_after(window: int) -> None:
    positions = jnp.arange(window + 1)
    found = jax.jit(lambda p: logit_scale.entropy_aware(p, 5, pretrained_window=window))(positions)
    np.testing.assert_array_equal(found[:window], np.ones(window, np.float32))
    assert found[window] > 1.0


def test_first_layers_are_exempt_when_the_layer_is_traced() -> None:
    positions = jnp.array([0, 600, 5000])
    for unscaled_layers in (0, 1, 2):
        s = scheme("eabf", pretrained_window=512, unscaled_layers=unscaled_layers)
        rows = jax.lax.map(functools.partial(s.logit_scale, positions), jnp.arange(4))
        expected = [[reference(p, layer, 512, unscaled_layers) for p in (0, 600, 5000)] for layer in range(4)]
        np.testing.assert_allclose(rows, expected, rtol=TOLERANCE)
        np.testing.assert_array_equal(rows[:unscaled_layers], np.ones((unscaled_layers, 3), np.float32))
        assert np.all(np.asarray(rows)[unscaled_layers:, 1:] > 1.0)


def test_padding_and_unsigned_positions_are_harmless() -> None:
    s = scheme("eabf", pretrained_window=512)
    np.testing.assert_array_equal(s.logit_scale(jnp.array([-1, -512]), 3), np.ones(2, np.float32))
    np.testing.assert_array_equal(s.logit_scale(jnp.array([0, 3], jnp.uint32), 3), np.ones(2, np.float32))


class Variants(chex.TestCase):
    """Compiled or not, a scheme has the same multipliers for positions of any shape."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_entropy_aware(self) -> None:
        s = scheme("eabf", pretrained_window=64)
        positions = jnp.arange(2 * 3 * 50).reshape(2, 3, 50)
        for layer in (1, 2):
            found = self.variant(s.logit_scale)(positions, jnp.int32(layer))
            expected = np.vectorize(lambda p, layer=layer: reference(p, layer, 64, 2))(np.asarray(positions))
            chex.assert_shape(found, (2, 3, 50))
            chex.assert_type(found, jnp.float32)
            chex.assert_trees_all_close(found, np.float32(expected), rtol=TOLERANCE)

    @chex.variants(with_jit=True, without_jit=True)
    def test_none(self) -> None:
        found = self.variant(scheme("pi", factor=4).logit_scale)(jnp.full((2, 5), 10**6), jnp.int32(7))
        chex.assert_type(found, jnp.float32)
        chex.assert_trees_all_equal(found, np.ones((2, 5), np.float32))


def test_positions_spread_over_eight_devices_give_what_one_device_gives() -> None:
    chex.assert_devices_available(8, "cpu")
    mesh = jax.make_mesh((2, 4), ("data", "context"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "context"))
    positions = jnp.arange(2 * 4096).reshape(2, 4096)
    multiplier = jax.jit(scheme("eabf", pretrained_window=512).logit_scale)
    one, eight = multiplier(positions, 3), multiplier(jax.device_put(positions, spread), 3)
    assert len(eight.sharding.device_set) == 8
    chex.assert_trees_all_equal(one, jax.device_get(eight))
