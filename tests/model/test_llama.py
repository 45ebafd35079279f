"""The model against transformers (float32) and against a forward pass in float64 NumPy written here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from weights import random_params, torch_state

from eabf_jax.errors import InputError
from eabf_jax.model import Llama, LlamaConfig, attention
from eabf_jax.model.llama import positions_from_segments, rotary_tables, segment_lengths
from eabf_jax.model.parameters import parameter_count
from eabf_jax.rope import Scheme, compose, from_hf, scheme

WINDOW = 16


def small(rope: Scheme | None = None, **changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 37, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": WINDOW,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes}, rope=rope or scheme("default"))


def tokens_for(config: LlamaConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length)).astype(np.int32)


def our_logits(config: LlamaConfig, params: Mapping[str, Any], tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    model = Llama.from_params(config, params, attention="reference")
    run = jax.jit(lambda model, tokens, inputs: model(tokens, **inputs))
    return np.asarray(run(model, tokens, inputs))


# --- transformers -----------------------------------------------------------------------------------------------------

HF_ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW,
        "beta_fast": 2.0, "beta_slow": 0.5,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    },
}  # fmt: skip


@settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    layers=st.integers(1, 4),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (8, 2)]),
    head_dim=st.sampled_from([8, 16]),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    batch=st.integers(1, 2),
    length=st.integers(WINDOW + 2, 3 * WINDOW),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("rope_type", HF_ROPES)
def test_logits_are_those_of_transformers(
    rope_type: str, layers: int, heads: tuple[int, int], head_dim: int, switches: tuple[bool, bool, bool],
    batch: int, length: int, seed: int,
) -> None:  # fmt: skip
    tied, attention_bias, mlp_bias = switches
    rope = HF_ROPES[rope_type]
    config = small(
        from_hf({"rope_parameters": rope, "max_position_embeddings": WINDOW}),
        num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        tie_word_embeddings=tied, attention_bias=attention_bias, mlp_bias=mlp_bias,
    )  # fmt: skip
    params, tokens = random_params(config, seed), tokens_for(config, batch, length, seed)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
            max_position_embeddings=WINDOW, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=tied,
            attention_bias=attention_bias, mlp_bias=mlp_bias, rope_parameters=dict(rope), attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    missing, unexpected = peer.load_state_dict(torch_state(params), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    with torch.no_grad():
        expected = peer(torch.from_numpy(tokens).long()).logits.numpy()
    assert expected.std() > 0.5  # otherwise the tolerance would mean nothing
    # The promised bound is 1e-4; float32 rounding through 4 layers of these sizes stays near 1e-5.
    np.testing.assert_allclose(our_logits(config, params, tokens), expected, atol=1e-4, rtol=0)


# --- float64 NumPy ----------------------------------------------------------------------------------------------------

Frequencies = Callable[[int], tuple[np.ndarray, float]]  # length -> frequencies, rotation scale
Multiplier = Callable[[int, int], float]  # layer, 0-based position -> logit multiplier


def theta(head_dim: int, base: float) -> np.ndarray:
    return np.array([base ** (-2 * j / head_dim) for j in range(head_dim // 2)])


def by_parts(head_dim: int, base: float, factor: float, fast: float, slow: float) -> np.ndarray:
    def dimension(turns: float) -> float:
        return head_dim * math.log(WINDOW / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), head_dim - 1)
    mixed = []
    for j, frequency in enumerate(theta(head_dim, base)):
        share = min(max((j - low) / ((high - low) or 0.001), 0.0), 1.0)
        mixed.append(frequency * (1 - share) + frequency / factor * share)
    return np.array(mixed)


def entropy_aware(unscaled_layers: int) -> Multiplier:
    def multiplier(layer: int, position: int) -> float:
        return 1.0 if layer < unscaled_layers else max(math.log(position + 1) / math.log(WINDOW), 1.0)

    return multiplier


def numpy_logits(
    config: LlamaConfig, params: Mapping[str, Any], tokens: np.ndarray, positions: np.ndarray,
    frequencies: Frequencies, multiplier: Multiplier,
) -> np.ndarray:  # fmt: skip
    """Computes one document token by token in float64: tokens [T], positions [T] -> logits [T, vocab]."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(params))
    length, head_dim = len(tokens), config.head_dim
    inverse, scale = frequencies(int(positions.max()) + 1)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def project(x: np.ndarray, part: Mapping[str, np.ndarray], layer: int) -> np.ndarray:
        return x @ part["kernel"][layer] + (part["bias"][layer] if "bias" in part else 0.0)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        turned = np.empty_like(x)
        for j, frequency in enumerate(inverse):
            pair = complex(x[j], x[j + head_dim // 2]) * np.exp(1j * position * frequency) * scale
            turned[j], turned[j + head_dim // 2] = pair.real, pair.imag
        return turned

    x = wide["embed_tokens"]["embedding"][tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        block = wide["layers"]
        h = norm(x, block["input_layernorm"]["scale"][layer])
        q, k, v = (
            project(h, block["self_attn"][f"{name}_proj"], layer).reshape(length, -1, head_dim) for name in "qkv"
        )
        attended = np.zeros_like(q)
        for head in range(config.num_attention_heads):
            keys = np.stack([rotated(k[s, head // group], positions[s]) for s in range(length)])
            for t in range(length):
                row = keys[: t + 1] @ rotated(q[t, head], positions[t]) / math.sqrt(head_dim)
                row = row * multiplier(layer, int(positions[t]))
                weights = np.exp(row - row.max())
                attended[t, head] = weights / weights.sum() @ v[: t + 1, head // group]
        x = x + project(attended.reshape(length, -1), block["self_attn"]["o_proj"], layer)
        h = norm(x, block["post_attention_layernorm"]["scale"][layer])
        gate = project(h, block["mlp"]["gate_proj"], layer)
        x = x + project(
            gate / (1 + np.exp(-gate)) * project(h, block["mlp"]["up_proj"], layer), block["mlp"]["down_proj"], layer
        )
    x = norm(x, wide["norm"]["scale"])
    return x @ (wide["lm_head"]["kernel"] if "lm_head" in wide else wide["embed_tokens"]["embedding"].T)


def unit(layer: int, position: int) -> float:
    return 1.0


RAMP = {"base": 1000.0, "pretrained_window": WINDOW, "beta_fast": 2.0, "beta_slow": 0.25}
# name: scheme, frequencies(length), multiplier; head_dim 8, 48 tokens = 3 windows
CASES: dict[str, tuple[Scheme, Frequencies, Multiplier]] = {
    "eabf": (
        scheme("eabf", base=50_000.0, pretrained_window=WINDOW), lambda _: (theta(8, 50_000.0), 1.0), entropy_aware(2),
    ),
    "eabf as released": (
        scheme("eabf", base=50_000.0, pretrained_window=WINDOW, unscaled_layers=0),
        lambda _: (theta(8, 50_000.0), 1.0),
        entropy_aware(0),
    ),
    "by-parts and entropy-aware": (
        compose(
            scheme("ntk_by_parts", factor=4.0, **RAMP), {"type": "entropy_aware", "pretrained_window": WINDOW}
        ),
        lambda _: (by_parts(8, 1000.0, 4.0, 2.0, 0.25), 1.0),
        entropy_aware(2),
    ),
    "yarn": (
        scheme("yarn", factor=4.0, **RAMP),
        lambda _: (by_parts(8, 1000.0, 4.0, 2.0, 0.25), 0.1 * math.log(4) + 1),
        unit,
    ),
    "dynamic_yarn": (
        scheme("dynamic_yarn", **RAMP),
        lambda length: (
            by_parts(8, 1000.0, max(length / WINDOW, 1.0), 2.0, 0.25), 0.1 * math.log(max(length / WINDOW, 1.0)) + 1,
        ),
        unit,
    ),
    "dynamic_ntk": (
        scheme("dynamic_ntk", factor=2.0, pretrained_window=WINDOW),
        lambda length: (theta(8, 10_000.0 * max(2.0 * length / WINDOW - 1.0, 1.0) ** (8 / 6)), 1.0),
        unit,
    ),
    "longrope": (
        scheme("longrope", factor=3.0, pretrained_window=WINDOW, short_factor=[1, 1, 1, 2], long_factor=[1, 2, 4, 7]),
        lambda length: (
            theta(8, 10_000.0) / (np.array([1, 2, 4, 7]) if length > WINDOW else np.array([1, 1, 1, 2])),
            math.sqrt(1 + math.log(3) / math.log(WINDOW)),
        ),
        unit,
    ),
    "eabf_stair": (
        scheme("eabf_stair", base=50_000.0, pretrained_window=WINDOW),
        lambda _: (theta(8, 50_000.0), 1.0),
        lambda _, position: 1 + math.log(1 + position // WINDOW) / math.log(WINDOW),
    ),
    "no rotation and scalable softmax": (
        compose({"type": "nope"}, {"type": "ssmax", "scaling": 0.43}),
        lambda _: (np.zeros(4), 1.0),
        lambda _, position: 0.43 * math.log(position + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_a_float64_forward_pass(name: str) -> None:
    rope, frequencies, multiplier = CASES[name]
    config = small(rope, num_hidden_layers=4, attention_bias=name == "eabf")
    params, tokens = random_params(config), tokens_for(config, 1, 3 * WINDOW)
    expected = numpy_logits(config, params, tokens[0], np.arange(3 * WINDOW), frequencies, multiplier)
    # float32 rounding through 4 layers; measured below 2e-5
    np.testing.assert_allclose(our_logits(config, params, tokens)[0], expected, atol=1e-4, rtol=0)


def test_every_part_of_a_scheme_changes_the_logits() -> None:
    """Without a multiplier or a scale, logits change by far more than 1e-4, so the comparison above can fail."""
    config = small(scheme("eabf", base=50_000.0, pretrained_window=WINDOW), num_hidden_layers=4)
    params, tokens = random_params(config), tokens_for(config, 1, 3 * WINDOW)
    reference = our_logits(config, params, tokens)[0]
    for layers in (0, 3):
        other = scheme("eabf", base=50_000.0, pretrained_window=WINDOW, unscaled_layers=layers)
        changed = our_logits(small(other, num_hidden_layers=4), params, tokens)[0]
        np.testing.assert_array_equal(changed[:WINDOW], reference[:WINDOW])  # unchanged within the window
        assert np.abs(changed[WINDOW + 4 :] - reference[WINDOW + 4 :]).max() > 1e-2


@pytest.mark.parametrize("name", ["eabf", "dynamic_yarn"])
def test_given_positions_are_used(name: str) -> None:
    rope, frequencies, multiplier = CASES[name]
    config = small(rope)
    params, tokens = random_params(config), tokens_for(config, 2, 10)
    positions = np.stack([np.arange(10) + 30, np.arange(10) * 3])
    ours = our_logits(config, params, tokens, positions=positions)
    for row in range(2):
        expected = numpy_logits(config, params, tokens[row], positions[row], frequencies, multiplier)
        np.testing.assert_allclose(ours[row], expected, atol=1e-4, rtol=0)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["eabf", "dynamic_yarn", "dynamic_ntk"])
def test_packed_documents_never_see_each_other(name: str, backend: str) -> None:
    """A row holds documents longer and shorter than the window; each has the logits of float64 NumPy on it alone."""
    rope, frequencies, multiplier = CASES[name]
    config = small(rope)
    params = random_params(config)
    first, second = tokens_for(config, 1, 30, 1)[0], tokens_for(config, 1, 11, 2)[0]
    row = np.concatenate([first, second, np.zeros(7, np.int32)])[None]
    segments = np.concatenate([np.full(30, 1), np.full(11, 2), np.zeros(7)]).astype(np.int32)[None]
    model = Llama.from_params(config, params, attention=backend)
    packed = np.asarray(jax.jit(lambda m: m(row, segment_ids=segments))(model))[0]
    for document, place in ((first, slice(0, 30)), (second, slice(30, 41))):
        expected = numpy_logits(config, params, document, np.arange(len(document)), frequencies, multiplier)
        np.testing.assert_allclose(packed[place], expected, atol=1e-4, rtol=0)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize("name", ["yarn", "dynamic_yarn"])
def test_padding_changes_nothing(name: str) -> None:
    config = small(CASES[name][0])
    params, tokens = random_params(config), tokens_for(config, 2, 40)
    tokens[0, 13:] = 0
    segments = np.ones((2, 40), np.int32)
    segments[0, 13:] = 0
    padded = our_logits(config, params, tokens, segment_ids=segments)
    # The same arithmetic on other array shapes differs only by float32 rounding.
    np.testing.assert_allclose(padded[0, :13], our_logits(config, params, tokens[:1, :13])[0], atol=2e-5, rtol=0)
    np.testing.assert_allclose(padded[1], our_logits(config, params, tokens[1:])[0], atol=2e-5, rtol=0)


def test_padding_at_position_0_needs_no_segment_ids() -> None:
    """The trainer gives padding position 0, so it does not lengthen the row for a dynamic scheme."""
    config = small(CASES["dynamic_yarn"][0])
    params, tokens = random_params(config), tokens_for(config, 1, 40)
    positions = np.arange(40)[None] * (np.arange(40) < 25)
    padded = our_logits(config, params, tokens, positions=positions)
    np.testing.assert_allclose(padded[0, :25], our_logits(config, params, tokens[:, :25])[0], atol=2e-5, rtol=0)


def test_positions_restart_with_each_segment() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 3, 1, 1, 0, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 0, 1, 0, 0]]
    np.testing.assert_array_equal(positions_from_segments(segments), expected)


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eabf", "dynamic_yarn"])
def test_angles_far_out_are_float32(name: str) -> None:
    rope, frequencies, _ = CASES[name]
    positions = np.array([[99_989, 100_003, 131_071]], np.int32)
    cos, sin = rotary_tables(rope, 8, jnp.asarray(positions), segment_lengths(jnp.asarray(positions), None))
    inverse, scale = frequencies(131_072)
    # The fastest angle is 131,071 x 1 in float32 (24 bits): off by at most half a unit of 2^-7.
    angles = positions[..., None] * inverse
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos, scale * np.cos(angles), atol=2**-8, rtol=0)
    np.testing.assert_allclose(sin, scale * np.sin(angles), atol=2**-8, rtol=0)


def sub_jaxprs(jaxpr: Any) -> list[Any]:
    """Yields a jaxpr and all jaxprs nested in it."""
    found = [jaxpr]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += sub_jaxprs(inner)
    return found


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bfloat16_is_for_matrix_products_only(backend: str) -> None:
    config = small(CASES["dynamic_yarn"][0])
    model = Llama.abstract(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, attention=backend)
    tokens = jax.ShapeDtypeStruct((2, 40), jnp.int32)
    graphdef, state = nnx.split(model)
    traced = jax.make_jaxpr(lambda state, tokens: nnx.merge(graphdef, state)(tokens))(state, tokens)
    equations = [equation for jaxpr in sub_jaxprs(traced.jaxpr) for equation in jaxpr.eqns]
    wide = {"cos", "sin", "exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "div", "reduce_sum", "reduce_max", "pow"}
    narrow = {
        (equation.primitive.name, str(variable.aval))
        for equation in equations
        if equation.primitive.name in wide
        for variable in equation.invars
        if getattr(variable.aval, "dtype", None) == jnp.bfloat16
    }
    assert not narrow
    assert {"cos", "sin", "exp", "rsqrt"} <= {equation.primitive.name for equation in equations}
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert len(products) >= 10  # 4 of attention, 3 of SwiGLU, 2 of the attention backend, the output projection
    assert {variable.aval.dtype for product in products for variable in product.invars} == {jnp.dtype(jnp.bfloat16)}
    assert traced.out_avals[0].dtype == jnp.float32


def test_bfloat16_logits_are_near_the_float32_ones() -> None:
    config = small(CASES["eabf"][0])
    params, tokens = random_params(config), tokens_for(config, 2, 40)
    model = Llama.from_params(config, params, dtype=jnp.bfloat16, attention="chunked")
    error = np.asarray(jax.jit(lambda model: model(tokens))(model)) - our_logits(config, params, tokens)
    # About 30 roundings to 8 bits, on logits with a standard deviation of about 1.5.
    assert 1e-4 < np.sqrt((error**2).mean()) < 0.08


# --- compilation and parameters ---------------------------------------------------------------------------------------


def equation_count(config: LlamaConfig) -> int:
    graphdef, state = nnx.split(Llama.abstract(config, attention="chunked"))
    tokens = jax.ShapeDtypeStruct((1, 40), jnp.int32)
    gradient = jax.grad(lambda state, tokens: nnx.merge(graphdef, state)(tokens).sum())
    return sum(len(jaxpr.eqns) for jaxpr in sub_jaxprs(jax.make_jaxpr(gradient)(state, tokens).jaxpr))


def test_the_program_does_not_grow_with_depth() -> None:
    rope = CASES["eabf"][0]
    shallow, deep = (equation_count(small(rope, num_hidden_layers=layers)) for layers in (2, 6))
    assert shallow == deep > 100


def test_the_abstract_model_holds_shapes_only() -> None:
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=16_384,
    )  # fmt: skip
    before = len(jax.live_arrays())
    leaves = jax.tree.leaves(Llama.abstract(config, param_dtype=jnp.bfloat16).parameters())
    assert len(jax.live_arrays()) == before
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    # LLaMA-2-7B as published
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameter_count(config) == 6_738_415_616


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_tree_is_the_documented_one(tied: bool) -> None:
    config = small(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    shapes = {
        ".".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(Llama.abstract(config).parameters())
    }
    expected = {
        "embed_tokens.embedding": (37, 32),
        "layers.input_layernorm.scale": (3, 32),
        "layers.post_attention_layernorm.scale": (3, 32),
        "layers.self_attn.q_proj.kernel": (3, 32, 32),
        "layers.self_attn.q_proj.bias": (3, 32),
        "layers.self_attn.k_proj.kernel": (3, 32, 16),
        "layers.self_attn.k_proj.bias": (3, 16),
        "layers.self_attn.v_proj.kernel": (3, 32, 16),
        "layers.self_attn.v_proj.bias": (3, 16),
        "layers.self_attn.o_proj.kernel": (3, 32, 32),
        "layers.self_attn.o_proj.bias": (3, 32),
        "layers.mlp.gate_proj.kernel": (3, 32, 40),
        "layers.mlp.gate_proj.bias": (3, 40),
        "layers.mlp.up_proj.kernel": (3, 32, 40),
        "layers.mlp.up_proj.bias": (3, 40),
        "layers.mlp.down_proj.kernel": (3, 40, 32),
        "layers.mlp.down_proj.bias": (3, 32),
        "norm.scale": (32,),
    }
    assert shapes == expected | ({} if tied else {"lm_head.kernel": (32, 37)})
    assert sum(math.prod(shape) for shape in shapes.values()) == parameter_count(config)


def test_random_parameters_have_the_configured_spread() -> None:
    config = small(initializer_range=0.05, attention_bias=True, vocab_size=500)
    params = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16).parameters())()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    kernel = np.asarray(params["layers"]["mlp"]["gate_proj"]["kernel"], np.float32)
    for drawn in (kernel, np.asarray(params["embed_tokens"]["embedding"], np.float32)):
        # the relative error of a standard deviation over n draws is 1 / sqrt(2 n), here below 0.013
        np.testing.assert_allclose(drawn.std(), 0.05, rtol=0.05)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # layers differ
    assert not np.any(params["layers"]["self_attn"]["q_proj"]["bias"])
    assert (params["norm"]["scale"] == 1).all()


def test_other_parameters_leave_the_model_as_it_is() -> None:
    config = small()
    template = Llama.abstract(config)
    first, second = random_params(config, 1), random_params(config, 2)
    model = template.with_parameters(first)
    other = model.with_parameters(second)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(template.parameters()))
    for held, expected in ((model, first), (other, second)):
        jax.tree.map(np.testing.assert_array_equal, held.parameters(), expected)


def test_a_wrong_parameter_tree_is_refused() -> None:
    config = small()
    params = random_params(config)
    missing = {name: part for name, part in params.items() if name != "norm"}
    with pytest.raises(InputError, match=r"parameter norm\.scale is missing; expected shape \[32\]"):
        Llama.from_params(config, missing)
    with pytest.raises(InputError, match=r"parameter lm_head\.kernel is not part of this model"):
        Llama.from_params(small(tie_word_embeddings=True), params)
    wrong = {**params, "lm_head": {"kernel": params["lm_head"]["kernel"].T}}
    with pytest.raises(InputError, match=r"lm_head\.kernel has shape \[37, 32\], expected \[32, 37\]"):
        Llama.from_params(config, wrong)
    with pytest.raises(InputError, match=r"layers\.input_layernorm\.scale has shape \[3, 32\], expected \[2, 32\]"):
        Llama.from_params(small(num_hidden_layers=2), params)


def test_an_unknown_attention_backend_is_refused() -> None:
    with pytest.raises(InputError, match="unknown attention backend 'flash'"):
        Llama.abstract(small(), attention="flash")


def test_an_attention_function_can_be_given() -> None:
    config = small()
    params, tokens = random_params(config), tokens_for(config, 1, 20)
    calls = []

    def recorded(*qkvs: Any) -> jax.Array:
        calls.append([x if x is None else x.shape for x in qkvs])
        return attention.BACKENDS["reference"](*qkvs)

    logits = jax.jit(lambda model: model(tokens))(Llama.from_params(config, params, attention=recorded))
    np.testing.assert_allclose(logits, our_logits(config, params, tokens), atol=2e-5, rtol=0)
    assert calls == [[(1, 20, 4, 8), (1, 20, 2, 8), (1, 20, 2, 8), None]]  # traced once for three layers


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        (np.array([[36, 37]]), {}, "tokens: values from 36 to 37 were given; 0 to 36 are possible"),
        (jnp.array([[0, -1]]), {}, "tokens: values from -1 to 0 were given"),
        (np.array([[2**32 + 1]]), {}, "tokens: values from 4294967297"),  # 1 in 32 bits
        ([1, 2], {}, r"tokens: int64 of shape \[2\] was given; integers of shape \[batch, length\] are needed"),
        ([[1.0, 2.0]], {}, r"tokens: float64 of shape \[1, 2\] was given"),
        ([[True]], {}, "tokens: bool of shape"),
        ([[1, 2], [3]], {}, "tokens: rows of different lengths"),
        (["text"], {}, "tokens: <U4 of shape"),
        (np.ones((0, 4), np.int32), {}, r"tokens: int32 of shape \[0, 4\] was given"),
        ([[1, 2]], {"positions": [[0, 1, 2]]}, r"positions: shape \[1, 3\] was given; that of the tokens, \[1, 2\]"),
        ([[1, 2]], {"positions": [[-1, 0]]}, "positions: values from -1 to 0 were given"),
        ([[1, 2]], {"positions": [0, 1]}, r"positions: int64 of shape \[2\] was given"),
        ([[1, 2]], {"segment_ids": [[0.0, 1.0]]}, "segment_ids: float64 of shape"),
        ([[1, 2]], {"segment_ids": [[0], [0]]}, r"segment_ids: shape \[2, 1\] was given"),
    ],
    ids=str,
)
def test_calls_that_are_no_rows_of_tokens_are_refused(tokens: Any, more: dict[str, Any], message: str) -> None:
    model = Llama.abstract(small())  # refused before any parameter is read
    with pytest.raises(InputError, match=message) as caught:
        model(tokens, **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, np.uint8, np.int64, jnp.uint32])
def test_lists_and_other_integers_are_rows_of_tokens_too(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Llama.abstract(small()), []
    monkeypatch.setattr(Llama, "embed", lambda self, embedding, tokens: seen.append(tokens) or jnp.ones((1, 3, 32)))
    tokens = [[3, 1, 36]] if kind is list else kind([[3, 1, 36]])
    shape = jax.eval_shape(lambda model: model(tokens, [[0, 1, 0]], [[0, 0, 1]]), model).shape
    assert shape == (1, 3, 37)
    assert seen[0].dtype == jnp.int32
    with pytest.raises(InputError, match=r"tokens: float32 of shape \[1, 3\] was given"):
        jax.eval_shape(lambda model, tokens: model(tokens), model, jax.ShapeDtypeStruct((1, 3), jnp.float32))
