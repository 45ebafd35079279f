"""The model for generation: separate weights per layer, a few large matrix products per layer, and a key-value cache.

A decode step does little but read every weight once, so no weight may be copied or cast on the way. Weights are in the
compute dtype, and each layer has its own arrays, because a slice of the stacked tensors of `llama.py` would be a copy.
One product computes q, k and v; another computes gate and up. The weights of the two products that write the residual
stream have the summed dimension last, so that each sum reads contiguous memory. The mathematics and dimensions are
those of `llama.py`, against which this module is tested.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.model.attention import precision_of
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.kv_cache import LayerCache
from eabf_jax.model.llama import Llama, Row, add_branch, final_norm, layer_tables, query_scale, rms_norm, rotate
from eabf_jax.model.parameters import Axes, parameter_axes, parameters

# (q, k, v, cache) -> attended values and the cache with k and v added; arrays are [B, T, heads, H].
CachedAttention = Callable[[Array, Array, Array, LayerCache], tuple[Array, LayerCache]]


class LayerWeights(NamedTuple):
    """The weights of one layer. Norms and biases are None where the model has none."""

    input_norm: Array | None  # [D]
    # [D, K * (G + 2) * H]: per key-value head its queries, key and value, so that a mesh can split by head.
    qkv: Array
    qkv_bias: Array | None  # [K * (G + 2) * H]
    q_norm: Array | None  # [H] or [N * H]
    k_norm: Array | None  # [H] or [K * H]
    output: Array  # [D, N * H]
    output_bias: Array | None  # [D]
    middle_norm: Array  # [D], before the MLP or after attention
    gate_up: Array  # [D, 2, F]
    gate_up_bias: Array | None  # [2, F]
    down: Array  # [D, F]
    down_bias: Array | None  # [D]
    last_norm: Array | None  # [D], after the MLP


class Weights(NamedTuple):
    """The weights of the whole model."""

    embedding: Array  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: Array  # [D]
    head: Array | None  # [D, V]; None if tied to the embedding


class _Form(NamedTuple):
    """How parameters of a layer become one array: what is done to their values, and to their logical axes."""

    values: Callable[[LlamaConfig, list[Array]], Array]
    axes: Callable[[Axes], Axes] = lambda axes: axes


def _joined_by_head(config: LlamaConfig, values: list[Array]) -> Array:
    parts = [x.reshape(*x.shape[:-1], config.num_key_value_heads, -1, config.head_dim) for x in values]
    joined = jnp.concatenate(parts, axis=-2)
    return joined.reshape(*joined.shape[:-3], -1)


_AS_IS = _Form(lambda config, values: values[0])
_TRANSPOSED = _Form(lambda config, values: values[0].T, lambda axes: axes[::-1])
_BY_HEAD = _Form(_joined_by_head)
_SIDE_BY_SIDE = _Form(lambda config, values: jnp.stack(values, axis=-2), lambda axes: (*axes[:-1], None, axes[-1]))

# The parameters in each array of `LayerWeights`.
_FORMS: dict[str, tuple[_Form, tuple[str, ...]]] = {
    "input_norm": (_AS_IS, ("input_layernorm.scale",)),
    "qkv": (_BY_HEAD, ("self_attn.q_proj.kernel", "self_attn.k_proj.kernel", "self_attn.v_proj.kernel")),
    "qkv_bias": (_BY_HEAD, ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
    "q_norm": (_AS_IS, ("self_attn.q_norm.scale",)),
    "k_norm": (_AS_IS, ("self_attn.k_norm.scale",)),
    "output": (_TRANSPOSED, ("self_attn.o_proj.kernel",)),
    "output_bias": (_AS_IS, ("self_attn.o_proj.bias",)),
    "middle_norm": (_AS_IS, ("post_attention_layernorm.scale",)),
    "gate_up": (_SIDE_BY_SIDE, ("mlp.gate_proj.kernel", "mlp.up_proj.kernel")),
    "gate_up_bias": (_SIDE_BY_SIDE, ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    "down": (_TRANSPOSED, ("mlp.down_proj.kernel",)),
    "down_bias": (_AS_IS, ("mlp.down_proj.bias",)),
    "last_norm": (_AS_IS, ("post_feedforward_layernorm.scale",)),
}

# Logical axes of the parameters that make up an array in `LayerWeights`, of that array, and of the others in `Weights`.
PART_AXES: dict[str, Axes] = {
    name: parameter_axes(("layers", *parts[0].split(".")))[1:] for name, (_, parts) in _FORMS.items()
}
LAYER_AXES: dict[str, Axes] = {name: form.axes(PART_AXES[name]) for name, (form, _) in _FORMS.items()}
AXES: dict[str, Axes] = {
    "embedding": parameter_axes(("embed_tokens", "embedding")),
    "norm": parameter_axes(("norm", "scale")),
    "head": parameter_axes(("lm_head", "kernel")),
}


class WeightSource(NamedTuple):
    """A model's weights as `Llama` names them, read one parameter at a time, or one layer of it."""

    config: LlamaConfig
    dtype: Any  # compute dtype
    read: Callable[[tuple[str, ...]], Any]  # path in the parameter tree -> array, or what yields one layer by its index


def source_of(model: Llama) -> WeightSource:
    """Reads weights from a model in memory, which stays as it is.

    Raises:
      InputError: the model has adapters.
    """
    if model.lora is not None:
        raise InputError(
            "the model has adapters beside its weights; load its directory, which merges them, to generate"
        )
    params = model.parameters()
    return WeightSource(
        model.config, model.dtype, lambda path: functools.reduce(lambda tree, key: tree[key], path, params)
    )


def weights_of(
    source: WeightSource, stored: Mapping[str, Sharding] | None = None, fused: Mapping[str, Sharding] | None = None
) -> Weights:
    """Makes the weights of generation, layer by layer and in the compute dtype.

    Beside what is made, devices hold the parameters of one field in one layer, and the host what `source` reads at a
    time.

    Args:
      source: the model's weights.
      stored: by field of `Weights` and `LayerWeights`, where a parameter that it is made of goes; None for the default
        device.
      fused: by field, where it goes itself; None leaves that to the compiler.
    """
    config, layers = source.config, source.config.num_hidden_layers
    present = {entry.path for entry in parameters(config)}

    def place(field: str, x: Any) -> Array:
        return jax.device_put(x, None if stored is None else stored[field]).astype(source.dtype)

    def by_layer(field: str) -> list[Array | None]:
        paths = [("layers", *part.split(".")) for part in _FORMS[field][1]]
        if paths[0] not in present:
            return [None] * layers
        stacked = [source.read(path) for path in paths]
        at = None if fused is None else fused[field]
        made = [_fused(field, config, at, [place(field, x[index]) for x in stacked]) for index in range(layers)]
        return jax.block_until_ready(made)  # then `stacked` is no longer needed

    fields = [by_layer(field) for field in LayerWeights._fields]
    return Weights(
        place("embedding", source.read(("embed_tokens", "embedding"))),
        tuple(LayerWeights(*layer) for layer in zip(*fields, strict=True)),
        place("norm", source.read(("norm", "scale"))),
        None if config.tie_word_embeddings else place("head", source.read(("lm_head", "kernel"))),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fused(field: str, config: LlamaConfig, sharding: Sharding | None, parts: list[Array]) -> Array:
    """Joins the parameters of one layer that make up a field."""
    y = _FORMS[field][0].values(config, parts)
    return y if sharding is None else jax.lax.with_sharding_constraint(y, sharding)


def layer(
    config: LlamaConfig,
    weights: LayerWeights,
    index: int | Int[Array, ""],
    x: Float[Array, "B T D"],
    row: Row,
    cache: LayerCache,
    attention: CachedAttention,
) -> tuple[Float[Array, "B T D"], LayerCache]:
    """Runs one decoder layer on new tokens.

    Args:
      index: 0-based layer index.
      x: hidden states before the layer, in the compute dtype.
      row: positions and rotary tables.
      attention: attends to the new tokens and to the cache.

    Returns:
      Hidden states after the layer, and the cache with the new tokens added.
    """
    groups = config.num_attention_heads // config.num_key_value_heads

    def normed(x: Array, scale: Array | None) -> Array:
        return x if scale is None else rms_norm(x, scale, config.rms_norm_eps)

    def heads(x: Array, scale: Array | None) -> Array:
        """[B, T, ..., H] -> [B, T, heads, H], normed as the model does."""
        if config.qk_norm == "full":
            x = normed(x.reshape(*x.shape[:2], -1), scale)
        x = x.reshape(*x.shape[:2], -1, config.head_dim)
        return normed(x, scale) if config.qk_norm == "head" else x

    before, after = (None, weights.middle_norm) if config.post_norm else (weights.middle_norm, None)
    qkv = _project(normed(x, weights.input_norm), weights.qkv, weights.qkv_bias)
    qkv = qkv.reshape(*x.shape[:2], config.num_key_value_heads, groups + 2, config.head_dim)
    q, k, v = heads(qkv[..., :groups, :], weights.q_norm), heads(qkv[..., groups, :], weights.k_norm), qkv[..., -1, :]
    tables = layer_tables(config, row, index)
    q = (rotate(q, *tables) * query_scale(config, row, index)[:, :, None, None]).astype(x.dtype)
    out, cache = attention(q, rotate(k, *tables).astype(x.dtype), v, cache)
    out = _contract(out.reshape(*x.shape[:2], -1), weights.output, weights.output_bias)
    x = add_branch(config, x, normed(out, after))
    gate_up = _project(normed(x, before), weights.gate_up, weights.gate_up_bias)
    out = _contract(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], weights.down, weights.down_bias)
    return add_branch(config, x, normed(out, weights.last_norm)), cache


def next_token_logits(config: LlamaConfig, weights: Weights, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Computes the next token's logits from the last layer's output.

    Args:
      x: hidden states after the last layer, in the compute dtype.

    Returns:
      float32 [batch, vocab_size].
    """
    hidden = final_norm(config, weights.norm, x)
    equation, kernel = ("bd,vd->bv", weights.embedding) if weights.head is None else ("bd,dv->bv", weights.head)
    return jnp.einsum(
        equation, hidden, kernel, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32
    )


def _project(x: Array, kernel: Array, bias: Array | None) -> Array:
    """x @ kernel: [..., in], [in, ...] -> [..., ...]."""
    y = jnp.tensordot(x, kernel, axes=1, precision=precision_of(x.dtype))
    return y if bias is None else y + bias


def _contract(x: Array, kernel: Array, bias: Array | None) -> Array:
    """x @ kernel.T: [..., in], [out, in] -> [..., out]."""
    if x.size == kernel.shape[1] and jax.default_backend() == "gpu":
        # With one token, a plain reduction gets closer to full memory bandwidth than a matrix product.
        y = (x[..., None, :].astype(jnp.float32) * kernel.astype(jnp.float32)).sum(-1).astype(x.dtype)
    else:
        y = jnp.einsum("...i,oi->...o", x, kernel, precision=precision_of(x.dtype))
    return y if bias is None else y + bias
