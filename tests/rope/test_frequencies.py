"""Every frequency rule against transformers and against a formula written out in Python floats."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eabf_jax.errors import InputError
from eabf_jax.rope import Scheme, frequencies, scheme

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
FACTORS = (1.0, 1.5, 4.0, 8.0, 32.0)
WINDOWS = (512, 4096, 8192)
LENGTHS = (1, 511, 512, 513, 4096, 4097, 8192, 20_000, 131_072)

# Computed in float64 and rounded once: half a unit in the last place is 2^-24 relative at most; the reference's own
# float64 error is far below the other half allowed here.
ONE_ULP = 2.0**-23
# A traced length is float32 arithmetic: YaRN's blend is a sum, a quotient and two products of rounded constants
# (3.3 * 2^-24 measured); NTK's power exp(x) has |x| <= ln(1 + 32 * 131072 / 512) = 9.01, so the rounding of x alone is
# 9 * 2^-24 (10.8 * 2^-24 measured).
TRACED_YARN = 6 * 2.0**-24
TRACED_NTK = 16 * 2.0**-24
# A logarithm, a product and a sum in float64 are each rounded by 2^-53 relative at most.
FLOAT64 = {"rel": 1e-15, "abs": 0.0}


def reference(name: str, d: int, p: Mapping[str, Any], length: int | None) -> tuple[list[float], float]:
    """Computes the schemes as their papers define them, one frequency at a time in Python floats."""
    b, s, c = p.get("base", 10_000.0), p.get("factor", 1.0), p.get("pretrained_window", 0)
    ordinary = [1.0 / b ** (2 * j / d) for j in range(d // 2)]
    if name == "nope":
        return [0.0] * (d // 2), 1.0
    if name in ("default", "abf", "eabf", "eabf_stair"):
        return ordinary, 1.0
    if name == "pi":
        return [theta / s for theta in ordinary], 1.0
    if name == "ntk":
        return [1.0 / (b * s ** (d / (d - 2))) ** (2 * j / d) for j in range(d // 2)], 1.0
    if name == "dynamic_ntk":
        longest = max(length or 0, c)
        grown = b * (s * longest / c - (s - 1)) ** (d / (d - 2))
        return [1.0 / grown ** (2 * j / d) for j in range(d // 2)], 1.0
    if name == "llama3":
        low, high = p.get("low_freq_factor", 1.0), p.get("high_freq_factor", 4.0)
        result = []
        for theta in ordinary:
            wavelength = 2 * math.pi / theta
            if wavelength < c / high:
                result.append(theta)
            elif wavelength > c / low:
                result.append(theta / s)
            else:
                smooth = (c / wavelength - low) / (high - low)
                result.append((1 - smooth) * theta / s + smooth * theta)
        return result, 1.0
    if name == "dynamic_yarn":
        s = max(1.0, (length or 0) / c)
    first = max(math.floor(d * math.log(c / (p.get("beta_fast", 32) * 2 * math.pi)) / (2 * math.log(b))), 0)
    last = min(math.ceil(d * math.log(c / (p.get("beta_slow", 1) * 2 * math.pi)) / (2 * math.log(b))), d - 1)
    result = []
    for j, theta in enumerate(ordinary):
        share = min(max((j - first) / (last - first if last != first else 0.001), 0.0), 1.0)
        result.append(share * theta / s + (1 - share) * theta)
    scale = 1.0 if name == "ntk_by_parts" else 0.1 * math.log(s) + 1.0
    return result, p.get("attention_factor") or scale


def longrope_lists(d: int) -> dict[str, list[float]]:
    indices = range(d // 2)
    return {"short_factor": [1 + 0.013 * j for j in indices], "long_factor": [1.1 + 0.37 * j * j for j in indices]}


def parameters(name: str, base: float, factor: float, window: int) -> dict[str, Any]:
    known = {"base": base, "factor": factor, "pretrained_window": window}
    takes = {
        "default": ("base",),
        "abf": ("base",),
        "eabf": ("base", "pretrained_window"),
        "eabf_stair": ("base", "pretrained_window"),
        "nope": (),
        "pi": ("base", "factor"),
        "ntk": ("base", "factor"),
    }
    return {key: known[key] for key in takes.get(name, tuple(known))}


ALL_NAMES = (
    "default",
    "pi",
    "ntk",
    "dynamic_ntk",
    "ntk_by_parts",
    "yarn",
    "dynamic_yarn",
    "abf",
    "eabf",
    "eabf_stair",
    "nope",
    "llama3",
)
# "longrope", whose parameters depend on the head size, has tests of its own.
FOLLOWING_LENGTH = ("dynamic_ntk", "dynamic_yarn")


def assert_agrees(s: Scheme, name: str, d: int, p: Mapping[str, Any], length: int | None) -> None:
    expected, scale = reference(name, d, p, length)
    found = s.inverse_frequencies(d, length)
    assert found.dtype == jnp.float32
    assert found.shape == (d // 2,)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=ONE_ULP, atol=0)
    assert isinstance(s.rotation_scale(length), float)
    assert s.rotation_scale(length) == pytest.approx(scale, **FLOAT64)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_fixed_grid_agrees_with_the_formula_to_one_unit_in_the_last_place(name: str) -> None:
    for factor in FACTORS:
        for window in WINDOWS:
            for base in (10_000.0, 500_000.0):
                p = parameters(name, base, factor, window)
                s = scheme(name, **p)
                for d in HEAD_DIMS:
                    for length in (None, *LENGTHS) if name in FOLLOWING_LENGTH else (None, 131_072):
                        assert_agrees(s, name, d, p, length)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(ALL_NAMES),
    d=st.integers(16, 128).map(lambda half: 2 * half),
    base=st.floats(1_000.0, 1e7),
    factor=st.floats(1.0, 32.0),
    window=st.integers(64, 131_072),
    length=st.integers(1, 131_072),
)
def test_any_parameters_agree_with_the_formula(
    name: str, d: int, base: float, factor: float, window: int, length: int
) -> None:
    p = parameters(name, base, factor, window)
    assert_agrees(scheme(name, **p), name, d, p, length)


def test_paper_values_by_hand() -> None:
    # head size 4: theta = 1, b^(-1/2)
    np.testing.assert_array_equal(
        scheme("default", base=10_000.0).inverse_frequencies(4), np.array([1.0, 0.01], np.float32)
    )
    np.testing.assert_array_equal(scheme("pi", factor=4).inverse_frequencies(4), np.array([0.25, 0.0025], np.float32))
    # b * 4^(4/2) = 160,000, whose root is 400
    np.testing.assert_array_equal(scheme("ntk", factor=4).inverse_frequencies(4), np.array([1.0, 0.0025], np.float32))
    # s L/c - (s - 1) = 4 * 2 - 3 = 5; b * 5^2 = 250,000, whose root is 500
    dynamic = scheme("dynamic_ntk", factor=4, pretrained_window=1024)
    np.testing.assert_array_equal(dynamic.inverse_frequencies(4, 2048), np.array([1.0, 0.002], np.float32))
    assert scheme("yarn", factor=math.e**2, pretrained_window=4096).rotation_scale() == pytest.approx(1.2, **FLOAT64)
    assert scheme("yarn", factor=4, pretrained_window=4096, attention_factor=1.25).rotation_scale() == 1.25
    assert scheme("ntk_by_parts", factor=4, pretrained_window=4096).rotation_scale() == 1.0


def test_by_parts_keeps_fast_frequencies_and_interpolates_slow_ones() -> None:
    d, window = 128, 4096
    plain = np.asarray(scheme("default").inverse_frequencies(d))
    parts = np.asarray(scheme("ntk_by_parts", factor=4, pretrained_window=window).inverse_frequencies(d))
    turns = window * plain.astype(np.float64) / (2 * math.pi)
    # one index of slack on either side, because the bounds are rounded outwards to whole indices
    np.testing.assert_array_equal(parts[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(parts[turns < 0.8], plain[turns < 0.8] / 4, rtol=ONE_ULP)
    between = (turns < 28) & (turns > 1.3)
    assert between.sum() > 10
    assert np.all((parts < plain)[between] & (parts > plain / 4)[between])


def test_a_ramp_of_no_width_beyond_the_last_index_interpolates_nothing() -> None:
    # 32 ln(800 / (32 * 2 pi)) / (2 ln 2) = 31.9: both ends of the ramp are clamped to d - 1 = 31.
    s = scheme("ntk_by_parts", base=2.0, factor=4.0, pretrained_window=800)
    np.testing.assert_array_equal(s.inverse_frequencies(32), scheme("default", base=2.0).inverse_frequencies(32))


# transformers computes in float32. b^(2j/d): the exponent is rounded to 2^-24 relative and multiplied by ln b, at most
# 23 here (dynamic: base 500,000 grown by (32 * 256)^(d / (d - 2))); a few roundings follow.
HF_TOLERANCE = 32 * 2.0**-24
# Its blends also round a share of the whole frequency; where the result is theta/32, this weighs up to 32 times.
HF_BLEND_TOLERANCE = 5 * 32 * 2.0**-24


def transformers_rotation(
    kind: str, d: int, base: float, window: int, length: int | None, **more: Any
) -> tuple[np.ndarray, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LlamaConfig(
            hidden_size=2 * d,
            num_attention_heads=2,
            head_dim=d,
            max_position_embeddings=window,
            rope_parameters={"rope_type": kind, "rope_theta": base, **more},
        )
    if kind == "default":
        values, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        values, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    return values.double().numpy(), scale


def hf_case(
    name: str, d: int, base: float, factor: float, window: int, length: int
) -> tuple[Scheme, tuple[np.ndarray, float], float]:
    """Returns a scheme, what transformers computes for it, and the tolerance between them."""
    if name in ("default", "abf"):
        return scheme(name, base=base), transformers_rotation("default", d, base, window, length), HF_TOLERANCE
    if name == "ntk":
        changed = base * factor ** (d / (d - 2))
        s = scheme("ntk", base=base, factor=factor)
        return s, transformers_rotation("default", d, changed, window, length), HF_TOLERANCE
    if name == "pi":
        s = scheme("pi", base=base, factor=factor)
        return s, transformers_rotation("linear", d, base, window, length, factor=factor), HF_TOLERANCE
    if name == "longrope":
        lists = longrope_lists(d)
        s = scheme("longrope", base=base, factor=factor, pretrained_window=window, **lists)
        theirs = transformers_rotation(
            "longrope", d, base, 2 * window, length, factor=factor, original_max_position_embeddings=window, **lists
        )
        return s, theirs, HF_TOLERANCE
    if name == "dynamic_ntk":
        s = scheme("dynamic_ntk", base=base, factor=factor, pretrained_window=window)
        return s, transformers_rotation("dynamic", d, base, window, length, factor=factor), HF_TOLERANCE
    s = scheme(name, base=base, factor=factor, pretrained_window=window)
    if name == "llama3":
        more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    else:
        more = {"attention_factor": 1.0} if name == "ntk_by_parts" else {}
    kind = "llama3" if name == "llama3" else "yarn"
    theirs = transformers_rotation(
        kind, d, base, 2 * window, length, factor=factor, original_max_position_embeddings=window, **more
    )
    return s, theirs, HF_BLEND_TOLERANCE


HF_NAMES = ("default", "abf", "ntk", "pi", "dynamic_ntk", "ntk_by_parts", "yarn", "llama3", "longrope")


def assert_agrees_with_transformers(name: str, d: int, base: float, factor: float, window: int, length: int) -> None:
    s, (expected, scale), tolerance = hf_case(name, d, base, factor, window, length)
    np.testing.assert_allclose(np.asarray(s.inverse_frequencies(d, length), np.float64), expected, rtol=tolerance)
    assert s.rotation_scale(length) == pytest.approx(scale, **FLOAT64)


@pytest.mark.parametrize("name", HF_NAMES)
def test_fixed_grid_agrees_with_transformers(name: str) -> None:
    for d in (32, 64, 128, 256):
        for base in (10_000.0, 500_000.0):
            for factor in (1.0, 4.0, 32.0):
                for length in (512, 131_072):
                    assert_agrees_with_transformers(name, d, base, factor, 512, length)
                assert_agrees_with_transformers(name, d, base, factor, 8192, 32_768)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(HF_NAMES),
    d=st.integers(16, 128).map(lambda half: 2 * half),
    base=st.floats(1_000.0, 500_000.0),
    factor=st.floats(1.0, 32.0),
    window=st.integers(512, 65_536),
    length=st.integers(1, 131_072),
)
def test_any_parameters_agree_with_transformers(
    name: str, d: int, base: float, factor: float, window: int, length: int
) -> None:
    assert_agrees_with_transformers(name, d, base, factor, window, length)


def test_yarn_reads_explicit_settings_as_transformers_does() -> None:
    s = scheme(
        "yarn",
        base=10_000.0,
        factor=4,
        pretrained_window=2048,
        beta_fast=64,
        beta_slow=2,
        attention_factor=0.75,
    )
    more = {"factor": 4.0, "original_max_position_embeddings": 2048, "beta_fast": 64.0, "beta_slow": 2.0}
    expected, scale = transformers_rotation("yarn", 64, 10_000.0, 8192, None, attention_factor=0.75, **more)
    np.testing.assert_allclose(s.inverse_frequencies(64), expected, rtol=HF_BLEND_TOLERANCE)
    assert s.rotation_scale() == scale == 0.75


@pytest.mark.parametrize(("name", "tolerance"), [("dynamic_ntk", TRACED_NTK), ("dynamic_yarn", TRACED_YARN)])
def test_traced_length_agrees_with_the_formula(name: str, tolerance: float) -> None:
    for d in (32, 128, 256):
        for factor, window in ((1.0, 512), (8.0, 4096), (32.0, 512)):
            p = parameters(name, 10_000.0, factor, window)
            s = scheme(name, **p)
            rotation = jax.jit(jax.vmap(lambda n, s=s, d=d: (s.inverse_frequencies(d, n), s.rotation_scale(n))))
            found, scales = rotation(jnp.array(LENGTHS))
            assert found.dtype == scales.dtype == jnp.float32
            for row, length in enumerate(LENGTHS):
                expected, scale = reference(name, d, p, length)
                np.testing.assert_allclose(np.asarray(found[row], np.float64), expected, rtol=tolerance)
                np.testing.assert_allclose(scales[row], scale, rtol=TRACED_YARN)


@pytest.mark.parametrize("name", FOLLOWING_LENGTH)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_within_the_window_a_traced_length_leaves_the_frequencies_bit_for_bit(name: str, dtype: Any) -> None:
    s = scheme(name, pretrained_window=4096, factor=8)
    plain = scheme("default").inverse_frequencies(128)
    for length in (1, 17, 4095, 4096):
        np.testing.assert_array_equal(jax.jit(lambda n: s.inverse_frequencies(128, n))(dtype(length)), plain)
        assert float(jax.jit(s.rotation_scale)(dtype(length))) == 1.0
    assert not np.array_equal(s.inverse_frequencies(128, jnp.int32(4097)), plain)


def test_a_length_array_outside_jit_counts_as_traced() -> None:
    s = scheme("dynamic_yarn", pretrained_window=512)
    np.testing.assert_allclose(
        s.inverse_frequencies(64, jnp.int32(2048)), s.inverse_frequencies(64, 2048), rtol=TRACED_YARN
    )
    assert isinstance(s.rotation_scale(np.int64(2048)), float)


class EveryScheme(chex.TestCase):
    """Compiled or not, a scheme has the same frequencies."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_inverse_frequencies(self) -> None:
        for name in ALL_NAMES:
            p = parameters(name, 10_000.0, 4.0, 1024)
            s = scheme(name, **p)
            found = self.variant(lambda n, s=s: s.inverse_frequencies(64, n))(jnp.int32(3000))
            expected = np.array(reference(name, 64, p, 3000)[0], np.float32)
            chex.assert_shape(found, (32,))
            chex.assert_type(found, jnp.float32)
            chex.assert_trees_all_close(found, expected, rtol=TRACED_NTK)

    @chex.variants(with_jit=True, without_jit=True)
    def test_rotation_scale(self) -> None:
        for name in ALL_NAMES:
            p = parameters(name, 10_000.0, 4.0, 1024)
            s = scheme(name, **p)
            found = self.variant(lambda n, s=s: jnp.float32(1.0) * s.rotation_scale(n))(jnp.int32(3000))
            chex.assert_type(found, jnp.float32)
            chex.assert_trees_all_close(found, np.float32(reference(name, 64, p, 3000)[1]), rtol=TRACED_YARN)


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 128).map(lambda half: 2 * half),
    base=st.floats(1_000.0, 1e7),
    factor=st.floats(0.1, 64.0),
    window=st.integers(2, 131_072),
    length=st.integers(1, 2**20),
)
def test_longrope_divides_each_frequency_by_its_own_number(
    d: int, base: float, factor: float, window: int, length: int
) -> None:
    lists = longrope_lists(d)
    s = scheme("longrope", base=base, factor=factor, pretrained_window=window, **lists)
    for at in (length, window, window + 1, None):
        divisors = lists["long_factor" if at is not None and at > window else "short_factor"]
        expected = [base ** (-2 * j / d) / divisor for j, divisor in enumerate(divisors)]
        found = s.inverse_frequencies(d, at)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=ONE_ULP, atol=0)
        if at is not None:
            np.testing.assert_array_equal(s.inverse_frequencies(d, jnp.int32(at)), found)
        # On the logits, the factor is that of cos times that of sin.
        assert s.rotation_scale(at) ** 2 == pytest.approx(1 + math.log(max(factor, 1)) / math.log(window), rel=1e-15)
    given = scheme("longrope", factor=factor, pretrained_window=window, attention_factor=1.25, **lists)
    assert given.rotation_scale() == given.rotation_scale(2**20) == 1.25


def test_longrope_has_a_number_for_each_frequency() -> None:
    s = scheme("longrope", factor=4, pretrained_window=64, **longrope_lists(14))
    with pytest.raises(InputError, match="have 7 and 7 numbers; a head with 16 rotated dimensions needs 8 in each"):
        s.inverse_frequencies(16)
    lists = longrope_lists(16) | {"long_factor": [2.0] * 7}
    with pytest.raises(InputError, match=r"must have the same number of values, found short_factor .*, long_factor "):
        scheme("longrope", factor=4, pretrained_window=64, **lists)
    with pytest.raises(InputError, match="have 8 and 7 numbers"):
        frequencies.longrope(16, None, factor=4.0, short_factor=(1.0,) * 8, long_factor=(1.0,) * 7, pretrained_window=4)


def test_longrope_lengths_in_one_program_choose_their_own_list() -> None:
    s = scheme("longrope", factor=4, pretrained_window=64, **longrope_lists(16))
    found = jax.jit(jax.vmap(lambda n: s.inverse_frequencies(16, n)))(jnp.array([1, 64, 65]))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found, [s.inverse_frequencies(16, n) for n in (1, 64, 65)])
    assert not np.array_equal(found[1], found[2])


def test_lengths_spread_over_eight_devices_give_what_one_device_gives() -> None:
    chex.assert_devices_available(8, "cpu")
    spread = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data"))
    lengths = jnp.arange(16) * 700 + 1
    for name in FOLLOWING_LENGTH:
        s = scheme(name, pretrained_window=1024, factor=4)
        rotation = jax.jit(jax.vmap(lambda n, s=s: s.inverse_frequencies(64, n)))
        one, eight = rotation(lengths), rotation(jax.device_put(lengths, spread))
        assert len(eight.sharding.device_set) == 8
        chex.assert_trees_all_equal(one, jax.device_get(eight))


@pytest.mark.parametrize("name", ALL_NAMES)
def test_everything_is_float32_with_64_bit_types_on(name: str) -> None:
    s = scheme(name, **parameters(name, 10_000.0, 4.0, 1024))
    with jax.enable_x64(True):
        assert s.inverse_frequencies(64).dtype == jnp.float32
        length = jnp.asarray(3000)
        assert length.dtype == jnp.int64
        values, scale = jax.jit(lambda n: (s.inverse_frequencies(64, n), jnp.float32(1) * s.rotation_scale(n)))(length)
        assert values.dtype == scale.dtype == jnp.float32
        assert jax.jit(s.logit_scale)(jnp.arange(4), 0).dtype == jnp.float32


@pytest.mark.parametrize("name", ALL_NAMES)
def test_odd_head_size_is_refused(name: str) -> None:
    s = scheme(name, **parameters(name, 10_000.0, 4.0, 1024))
    with pytest.raises(InputError, match=r"head_dim 63: .*even head size"):
        s.inverse_frequencies(63)


@pytest.mark.parametrize("name", ["ntk", "dynamic_ntk"])
def test_head_size_two_is_refused_where_the_exponent_divides_by_d_minus_two(name: str) -> None:
    s = scheme(name, **parameters(name, 10_000.0, 4.0, 1024))
    with pytest.raises(InputError, match=r"head_dim 2: .*at least 4"):
        s.inverse_frequencies(2, 2048)
    np.testing.assert_array_equal(frequencies.default(2)[0], np.array([1.0], np.float32))
