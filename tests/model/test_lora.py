import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eabf_jax.errors import InputError
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.llama import Initializer, Linear
from eabf_jax.model.lora import Lora, merged_kernel, split_trained
from eabf_jax.model.parameters import PROJECTIONS

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32, attention_bias=True,
)  # fmt: skip


def paths(tree):
    return {".".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0; a positive number is needed"),
        ({"alpha": -1.0}, r"lora\.alpha is -1\.0; a positive number is needed"),
        ({"alpha": float("nan")}, r"lora\.alpha is nan"),
        ({"targets": ()}, r"lora\.targets is empty; any of q_proj, k_proj"),
        ({"targets": ("q_proj", "o_porj")}, r"lora\.targets 'o_porj': did you mean 'o_proj'"),
        ({"targets": ("q_proj", "q_proj")}, r"lora\.targets names a projection twice"),
    ],
    ids=str,
)
def test_bad_values_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        Lora(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_projection_adds_its_adapters_product(dtype):
    """Against float64 NumPy: y = x W + (x A) B alpha / rank + bias."""
    lora, rng = Lora(rank=3, alpha=4.5), np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, head_dim=6)
    init = Initializer(config, rngs=nnx.Rngs(0), param_dtype=dtype, lora=lora)
    linear = Linear(init, ("layers", "self_attn", "q_proj"))
    assert np.all(linear.lora_b[...] == 0)
    drawn = {"kernel": (16, 24), "lora_a": (16, 3), "lora_b": (3, 24), "bias": (24,)}
    values = {name: jnp.asarray(rng.normal(0, 0.3, shape), dtype) for name, shape in drawn.items()}
    nnx.update(linear, values)
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), dtype)
    w, a, b, bias, x64 = (np.float64(v) for v in (*(values[k] for k in ("kernel", "lora_a", "lora_b", "bias")), x))
    expected = x64 @ w + (x64 @ a) @ b * (4.5 / 3) + bias
    # Sums of a few dozen products of order one: roundings of 6e-8, or 4e-3 relative to a sum of up to 8.
    np.testing.assert_allclose(np.float64(linear(x)), expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.06)


def test_adapters_stand_beside_the_projections_named():
    model = Llama.abstract(CONFIG, lora=Lora(rank=2, targets=("k_proj", "down_proj")))
    shapes = {name: leaf.shape for name, leaf in ((p, x) for p, x in _named(model.parameters())) if "lora" in name}
    assert shapes == {
        "layers.self_attn.k_proj.lora_a": (2, 16, 2),
        "layers.self_attn.k_proj.lora_b": (2, 2, 8),
        "layers.mlp.down_proj.lora_a": (2, 24, 2),
        "layers.mlp.down_proj.lora_b": (2, 2, 16),
    }
    assert not any("lora" in name for name in paths(Llama.abstract(CONFIG).parameters()))


def _named(tree):
    return [(".".join(key.key for key in path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def test_fresh_adapters_change_nothing_and_merged_ones_are_the_same_model():
    lora = Lora(rank=3, alpha=6.0, targets=PROJECTIONS)
    model = Llama(CONFIG, rngs=nnx.Rngs(1), attention="reference", lora=lora)
    tokens = np.random.default_rng(1).integers(0, 40, (2, 12))
    _, base = split_trained(model.parameters(), lora)
    untouched = Llama.from_params(CONFIG, base, attention="reference")(tokens)
    np.testing.assert_array_equal(model(tokens), untouched)

    rng = np.random.default_rng(2)

    def draw(path, leaf):
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32) if path[-1].key == "lora_b" else np.asarray(leaf)

    drawn = jax.tree.map_with_path(draw, model.parameters())
    expected = model.with_parameters(drawn)(tokens)
    for block, names in (("self_attn", PROJECTIONS[:4]), ("mlp", PROJECTIONS[4:])):
        for name in names:
            leaves = drawn["layers"][block][name]
            base["layers"][block][name]["kernel"] = merged_kernel(
                leaves["kernel"], leaves["lora_a"], leaves["lora_b"], lora.scale
            )
    found = Llama.from_params(CONFIG, base, attention="reference")(tokens)
    # Float32 sums in another order, through two layers.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - untouched).max() > 0.1


def test_merging_is_done_in_float32():
    """The adapters' product is far below the last bit of the bfloat16 base; nothing is lost until the caller casts."""
    kernel = np.ones((2, 2), jnp.bfloat16)
    a, b = np.full((2, 1), 2.0**-6, np.float32), np.full((1, 2), 2.0**-6, np.float32)
    found = merged_kernel(kernel, a, b, scale=2.0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.full((2, 2), 1 + 2.0**-11, np.float32))


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_what_is_trained(embeddings, norms):
    lora = Lora(rank=2, targets=("q_proj",), train_embeddings=embeddings, train_norms=norms)
    params = Llama.abstract(CONFIG, lora=lora).parameters()
    trained, frozen = (paths(tree) for tree in split_trained(params, lora))
    expected = {"layers.self_attn.q_proj.lora_a", "layers.self_attn.q_proj.lora_b"}
    if embeddings:
        expected |= {"embed_tokens.embedding"}
    if norms:
        expected |= {"norm.scale", "layers.input_layernorm.scale", "layers.post_attention_layernorm.scale"}
    assert trained == expected
    assert trained | frozen == paths(params)
    assert not trained & frozen
    assert split_trained(params, None) == (params, {})


def test_a_description_is_a_key():
    """Plans are cached by it."""
    assert hash(Lora()) == hash(dataclasses.replace(Lora()))
