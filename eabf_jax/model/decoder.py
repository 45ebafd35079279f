"""LLaMA as generation runs it: each layer's weights by themselves, few large products a layer, a cache of keys.

A decode step reads every weight once and does little else, so nothing may copy or cast one on the way: the weights are
in the compute dtype, and a layer's are arrays of their own (a slice of the stacked tensors of `llama.py` would be a
copy). q, k and v are one product, as are gate and up. The two products that end in the residual stream have few numbers
that are sums of many: their weights have the summed dimension last, where it is one stretch of memory. The mathematics
is that of `llama.py`, against which it is tested. Dimensions: as there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.model.attention import precision_of
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.kv_cache import LayerCache
from eabf_jax.model.llama import Llama, Row, rms_norm, rotate
from eabf_jax.rope import Scheme

# (q, k, v, cache) -> attended values and the cache with k and v in it; [B, T, heads, H] each.
CachedAttention = Callable[[Array, Array, Array, LayerCache], tuple[Array, LayerCache]]


class LayerWeights(NamedTuple):
    """One layer. Biases are None where the model has none."""

    input_norm: Array  # [D]
    # [D, K * (G + 2) * H]: a key-value head's queries, its key and its value, then the next head's; so a mesh can split
    # them as one.
    qkv: Array
    qkv_bias: Array | None  # [K * (G + 2) * H]
    output: Array  # [D, N * H]
    output_bias: Array | None  # [D]
    mlp_norm: Array  # [D]
    gate_up: Array  # [D, 2, F]
    gate_up_bias: Array | None  # [2, F]
    down: Array  # [D, F]
    down_bias: Array | None  # [D]


class Weights(NamedTuple):
    """The whole model."""

    embedding: Array  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: Array  # [D]
    head: Array | None  # [D, V]; None: the embedding is the head's too


def weights_of(model: Llama) -> Weights:
    """Takes a model's parameters apart by layer, in its compute dtype.

    Args:
      model: with parameters that one device can hold twice.

    Returns:
      The weights.
    Raises:
      InputError: a model with adapters.
    """
    if model.lora is not None:
        raise InputError(
            "the model has adapters beside its weights; load its directory, which merges them, to generate"
        )
    config, params = model.config, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    stacked, dtype = params["layers"], model.dtype
    take = jax.jit(_layer_weights, static_argnums=(2, 3))
    layers = tuple(take(stacked, index, config, dtype) for index in range(config.num_hidden_layers))
    head = None if model.lm_head is None else params["lm_head"]["kernel"].astype(dtype)
    return Weights(
        params["embed_tokens"]["embedding"].astype(dtype), layers, params["norm"]["scale"].astype(dtype), head
    )


def _layer_weights(stacked: dict, index: int, config: LlamaConfig, dtype: jnp.dtype) -> LayerWeights:
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False).astype(dtype), stacked)
    attention, mlp = layer["self_attn"], layer["mlp"]

    def by_head(name: str, part: str) -> Array:
        x = attention[name][part]
        return x.reshape(*x.shape[:-1], config.num_key_value_heads, -1, config.head_dim)

    def qkv(part: str) -> Array:
        joined = jnp.concatenate([by_head(name, part) for name in ("q_proj", "k_proj", "v_proj")], axis=-2)
        return joined.reshape(*joined.shape[:-3], -1)

    def gate_up(part: str) -> Array:
        return jnp.stack([mlp[name][part] for name in ("gate_proj", "up_proj")], axis=-2)

    return LayerWeights(
        input_norm=layer["input_layernorm"]["scale"],
        qkv=qkv("kernel"),
        qkv_bias=qkv("bias") if config.attention_bias else None,
        output=attention["o_proj"]["kernel"].T,
        output_bias=attention["o_proj"].get("bias"),
        mlp_norm=layer["post_attention_layernorm"]["scale"],
        gate_up=gate_up("kernel"),
        gate_up_bias=gate_up("bias") if config.mlp_bias else None,
        down=mlp["down_proj"]["kernel"].T,
        down_bias=mlp["down_proj"].get("bias"),
    )


def rows(rope: Scheme, head_dim: int, positions: Int[Array, "B T"], length: int | Int[Array, "B"] | None) -> Row:
    """What every layer is told of tokens at these positions.

    Args:
      rope: the rotary scheme.
      head_dim: size of one head.
      positions: int32 [batch, length], 0-based.
      length: the current length that dynamic schemes follow: one for all rows, known before tracing, or each row's
        own; None for one within the pretrained window. Other schemes do not look at it.

    Returns:
      Positions, cosines and sines.
    """
    if rope.depends_on_length and isinstance(length, jax.Array):

        def rotation(row: Array) -> tuple[Array, Array]:
            return rope.inverse_frequencies(head_dim, row), jnp.asarray(rope.rotation_scale(row), jnp.float32)

        frequencies, scale = jax.vmap(rotation)(length)
        frequencies, scale = frequencies[:, None], scale[:, None, None]
    else:
        static = None if isinstance(length, jax.Array) else length
        frequencies, scale = rope.inverse_frequencies(head_dim, static), jnp.float32(rope.rotation_scale(static))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Row(positions, jnp.cos(angles) * scale, jnp.sin(angles) * scale, None)


def layer(
    config: LlamaConfig,
    weights: LayerWeights,
    index: int | Int[Array, ""],
    x: Float[Array, "B T D"],
    row: Row,
    cache: LayerCache,
    attention: CachedAttention,
) -> tuple[Float[Array, "B T D"], LayerCache]:
    """One decoder layer on new tokens.

    Args:
      config: the model's shape.
      weights: the layer's.
      index: 0-based, of the layer.
      x: hidden states before it, in the compute dtype.
      row: from `rows`.
      cache: the layer's.
      attention: attends to the new tokens and to the cache.

    Returns:
      Hidden states after the layer, and its cache with the new tokens.
    """
    eps, groups = config.rms_norm_eps, config.num_attention_heads // config.num_key_value_heads
    qkv = _project(rms_norm(x, weights.input_norm, eps), weights.qkv, weights.qkv_bias)
    qkv = qkv.reshape(*x.shape[:2], config.num_key_value_heads, groups + 2, config.head_dim)
    q = qkv[..., :groups, :].reshape(*x.shape[:2], config.num_attention_heads, config.head_dim)
    k, v = qkv[..., groups, :], qkv[..., groups + 1, :]
    q_scale = config.rope.logit_scale(row.positions, index) * config.head_dim**-0.5
    q = (rotate(q, row.cos, row.sin) * q_scale[:, :, None, None]).astype(x.dtype)
    k = rotate(k, row.cos, row.sin).astype(x.dtype)
    out, cache = attention(q, k, v, cache)
    x = x + _contract(out.reshape(*x.shape[:2], -1), weights.output, weights.output_bias)
    gate_up = _project(rms_norm(x, weights.mlp_norm, eps), weights.gate_up, weights.gate_up_bias)
    x = x + _contract(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], weights.down, weights.down_bias)
    return x, cache


def next_token_logits(config: LlamaConfig, weights: Weights, x: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Logits after the last layer, float32.

    Args:
      config: the model's shape.
      weights: the model's.
      x: hidden states after the last layer, in the compute dtype.

    Returns:
      float32 [batch, vocab_size].
    """
    hidden = rms_norm(x, weights.norm, config.rms_norm_eps)
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
        # One token is no work for a matrix unit: a plain reduction reads nearer to the memory's full speed.
        y = (x[..., None, :].astype(jnp.float32) * kernel.astype(jnp.float32)).sum(-1).astype(x.dtype)
    else:
        y = jnp.einsum("...i,oi->...o", x, kernel, precision=precision_of(x.dtype))
    return y if bias is None else y + bias
