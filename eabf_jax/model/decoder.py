"""LLaMA for generation: separate weights per layer, a few large matrix products per layer, and a key-value cache.

A decode step does little but read every weight once, so no weight may be copied or cast on the way. Weights are in the
compute dtype, and each layer has its own arrays, because a slice of the stacked tensors of `llama.py` would be a copy.
One product computes q, k and v; another computes gate and up. The weights of the two products that write the residual
stream have the summed dimension last, so that each sum reads contiguous memory. The mathematics and dimensions are
those of `llama.py`, against which this module is tested.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.model.attention import precision_of
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.kv_cache import LayerCache
from eabf_jax.model.llama import Llama, Row, rms_norm, rotate
from eabf_jax.model.parameters import Axes, flatten, parameter_axes

# (q, k, v, cache) -> attended values and the cache with k and v added; arrays are [B, T, heads, H].
CachedAttention = Callable[[Array, Array, Array, LayerCache], tuple[Array, LayerCache]]


class LayerWeights(NamedTuple):
    """The weights of one layer. Biases are None where the model has none."""

    input_norm: Array  # [D]
    # [D, K * (G + 2) * H]: per key-value head its queries, key and value, so that a mesh can split by head.
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
    "output": (_TRANSPOSED, ("self_attn.o_proj.kernel",)),
    "output_bias": (_AS_IS, ("self_attn.o_proj.bias",)),
    "mlp_norm": (_AS_IS, ("post_attention_layernorm.scale",)),
    "gate_up": (_SIDE_BY_SIDE, ("mlp.gate_proj.kernel", "mlp.up_proj.kernel")),
    "gate_up_bias": (_SIDE_BY_SIDE, ("mlp.gate_proj.bias", "mlp.up_proj.bias")),
    "down": (_TRANSPOSED, ("mlp.down_proj.kernel",)),
    "down_bias": (_AS_IS, ("mlp.down_proj.bias",)),
}

# Logical axes of the arrays in `LayerWeights`, and of the others in `Weights`.
LAYER_AXES: dict[str, Axes] = {
    name: form.axes(parameter_axes(("layers", *parts[0].split(".")))[1:]) for name, (form, parts) in _FORMS.items()
}
AXES: dict[str, Axes] = {
    "embedding": parameter_axes(("embed_tokens", "embedding")),
    "norm": parameter_axes(("norm", "scale")),
    "head": parameter_axes(("lm_head", "kernel")),
}


def weights_of(model: Llama) -> Weights:
    """Splits a model's parameters by layer and casts them to its compute dtype.

    Args:
      model: a model whose parameters fit on one device twice.

    Raises:
      InputError: the model has adapters.
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
    parameters = {".".join(path): leaf for path, leaf in flatten(layer)}

    def made(form: _Form, parts: tuple[str, ...]) -> Any:
        return form.values(config, [parameters[part] for part in parts]) if parts[0] in parameters else None

    return LayerWeights(**{name: made(*form) for name, form in _FORMS.items()})


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
      config: the model's shape.
      weights: this layer's weights.
      index: 0-based layer index.
      x: hidden states before the layer, in the compute dtype.
      row: positions and rotary tables.
      cache: this layer's cache.
      attention: attends to the new tokens and to the cache.

    Returns:
      Hidden states after the layer, and the cache with the new tokens added.
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
    """Computes the next token's logits from the last layer's output.

    Args:
      config: the model's shape.
      weights: the model's weights.
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
        # With one token, a plain reduction gets closer to full memory bandwidth than a matrix product.
        y = (x[..., None, :].astype(jnp.float32) * kernel.astype(jnp.float32)).sum(-1).astype(x.dtype)
    else:
        y = jnp.einsum("...i,oi->...o", x, kernel, precision=precision_of(x.dtype))
    return y if bias is None else y + bias
