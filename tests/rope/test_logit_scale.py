"""The multipliers against their formulas in float64 and transformers, and where they must be exactly 1."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from eabf_jax.rope import Scheme, compose, logit_scale, scheme

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


def multiplier(kind: str, **parameters: float | tuple[float, ...]) -> Scheme:
    return compose({"type": "default"}, {"type": kind, **parameters})


def test_logn_is_the_list_of_qwen() -> None:
    """Qwen-1's modeling_qwen.py has one number for each 1-based position, and uses them in every layer."""
    window = 2048
    qwen = [math.log(i, window) if i > window else 1 for i in range(1, 32_768)]
    s = multiplier("logn", pretrained_window=window)
    for layer in (0, 31):
        np.testing.assert_allclose(s.logit_scale(jnp.arange(len(qwen)), layer), qwen, rtol=TOLERANCE)


@pytest.mark.parametrize("window", [512, 4096])
def test_the_smooth_form_with_the_slope_of_the_window_is_entropy_aware(window: int) -> None:
    positions = jnp.arange(32 * window)
    ours = np.asarray(scheme("eabf", pretrained_window=window, unscaled_layers=0).logit_scale(positions, 0))
    found = multiplier("smooth_temperature", pretrained_window=window).logit_scale(positions, 0)
    np.testing.assert_array_equal(found, ours)
    given = multiplier("smooth_temperature", pretrained_window=window, beta=1 / math.log(window))
    np.testing.assert_array_equal(given.logit_scale(positions, 0), ours)


@settings(max_examples=100, deadline=None)
@given(
    position=st.integers(0, 2**24 - 2),
    window=st.integers(2, 131_072),
    beta=st.one_of(st.none(), st.floats(0.0, 1.0)),
    one_based=st.booleans(),
)
def test_any_parameters_of_the_temperatures_agree_with_the_formulas(
    position: int, window: int, beta: float | None, one_based: bool
) -> None:
    growth = 1 / math.log(window) if beta is None else beta
    near = (position, position // window * window, max(position // window * window - 1, 0))
    stair = multiplier("llama4_temperature", pretrained_window=window, beta=beta, one_based=one_based)
    smooth = multiplier("smooth_temperature", pretrained_window=window, beta=beta)
    for found, expected in (
        (stair, [1 + growth * math.log(1 + (p + one_based) // window) for p in near]),
        (smooth, [1 + growth * math.log(max((p + 1) / window, 1)) for p in near]),
    ):
        np.testing.assert_allclose(found.logit_scale(jnp.array(near), 0), expected, rtol=TOLERANCE)


def queries_of_llama4(tuned: bool, **config: float) -> torch.Tensor:
    """Returns the queries [length, heads, head_dim] that one of Llama 4's layers without rotation compares to keys."""
    seen: list[torch.Tensor] = []

    def spy(module: torch.nn.Module, query: torch.Tensor, *arguments: object, **options: object) -> tuple:
        seen.append(query)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("spy", spy)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    settings = transformers.Llama4TextConfig(
        **sizes, num_hidden_layers=1, no_rope_layers=[0], attn_temperature_tuning=tuned, moe_layers=[], **config
    )
    settings._attn_implementation = "spy"
    torch.manual_seed(0)
    Llama4TextAttention(settings, 0)(torch.ones(1, 100, 16), None, None)
    return seen[0][0].transpose(0, 1)


def test_the_one_based_stair_is_that_of_llama4() -> None:
    config = {"floor_scale": 16, "attn_scale": 0.25}
    ratio = (queries_of_llama4(True, **config) / queries_of_llama4(False, **config)).double().detach().numpy()
    s = multiplier("llama4_temperature", pretrained_window=16, beta=0.25, one_based=True)
    found = np.asarray(s.logit_scale(jnp.arange(100), 3), np.float64)[:, None, None]
    # The product and the quotient of queries are two more roundings.
    np.testing.assert_allclose(ratio, np.broadcast_to(found, ratio.shape), rtol=TOLERANCE)
    assert found[14] == 1 and found[15] > 1


def test_the_stair_is_that_of_ministral3() -> None:
    window = 4096
    positions = np.concatenate([np.arange(3 * window), np.arange(-2, 3) + 32 * window])
    theirs = get_llama_4_attn_scale(torch.from_numpy(positions)[None], 0.1, window)[0, 0, :, 0].double().numpy()
    found = multiplier("llama4_temperature", pretrained_window=window, beta=0.1).logit_scale(jnp.asarray(positions), 0)
    np.testing.assert_allclose(found, theirs, rtol=TOLERANCE)
    np.testing.assert_array_equal(found[:window], np.ones(window, np.float32))
    assert found[window] > 1


def test_eabf_stair_is_eabf_at_the_end_of_each_window_length() -> None:
    window = 512
    positions = np.arange(32 * window)
    ends = positions // window * window + window - 1
    stair = scheme("eabf_stair", pretrained_window=window).logit_scale(jnp.asarray(positions), 0)
    eabf = np.maximum(np.log(ends + 1.0) / np.log(float(window)), 1.0)
    np.testing.assert_allclose(stair, eabf, rtol=TOLERANCE)


def test_layer_temperature_has_the_smooth_form_with_each_layers_own_slope() -> None:
    betas = (0.0, 0.125, 0.5, -0.0625)
    s = multiplier("layer_temperature", pretrained_window=300, betas=betas)
    positions = np.array([0, 298, 299, 300, 1000, 2**20])
    rows = jax.lax.map(functools.partial(s.logit_scale, jnp.asarray(positions)), jnp.arange(4))
    expected = [1 + beta * np.log(np.maximum((positions + 1.0) / 300, 1.0)) for beta in betas]
    np.testing.assert_allclose(rows, expected, rtol=TOLERANCE)
    np.testing.assert_array_equal(rows[:, :3], np.ones((4, 3), np.float32))


@settings(max_examples=50, deadline=None)
@given(position=st.integers(0, 2**24 - 2), scaling=st.floats(0.01, 2.0))
def test_ssmax_is_a_multiple_of_the_logarithm(position: int, scaling: float) -> None:
    found = multiplier("ssmax", scaling=scaling).logit_scale(jnp.array([position, 0]), 0)
    np.testing.assert_allclose(found, [scaling * math.log(position + 1), 0.0], rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["smooth_temperature", "llama4_temperature", "logn", "ssmax"])
def test_every_multiplier_takes_padding_unsigned_positions_and_a_traced_layer(kind: str) -> None:
    s = multiplier(kind, **({"scaling": 0.5} if kind == "ssmax" else {"pretrained_window": 16}))
    at_start = 0.0 if kind == "ssmax" else 1.0
    np.testing.assert_array_equal(s.logit_scale(jnp.array([[-1, -16]]), 3), np.full((1, 2), at_start, np.float32))
    positions = jnp.arange(40, dtype=jnp.uint32).reshape(2, 20)
    found = jax.jit(s.logit_scale)(positions, jnp.int32(0))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, s.logit_scale(positions.astype(jnp.int32), 7), rtol=TOLERANCE)
    with jax.enable_x64(True):
        assert jax.jit(s.logit_scale)(jnp.arange(4), 0).dtype == jnp.float32


def test_positions_spread_over_eight_devices_give_what_one_device_gives() -> None:
    chex.assert_devices_available(8, "cpu")
    mesh = jax.make_mesh((2, 4), ("data", "context"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "context"))
    positions = jnp.arange(2 * 4096).reshape(2, 4096)
    compute = jax.jit(scheme("eabf", pretrained_window=512).logit_scale)
    one, eight = compute(positions, 3), compute(jax.device_put(positions, spread), 3)
    assert len(eight.sharding.device_set) == 8
    chex.assert_trees_all_equal(one, jax.device_get(eight))
