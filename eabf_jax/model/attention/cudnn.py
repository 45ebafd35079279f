"""cuDNN's fused kernel (NVIDIA GPUs, bfloat16 or float16).

Source: `jax.nn.dot_product_attention`. Its two primitives are called directly, because its own derivative does not
expose the float32 log-sum-exp. They are private, so they are imported only where the kernel runs. With segment ids the
kernel takes a [B, 1, T, T] mask, which is meant for the short windows of packed pretraining.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from eabf_jax.errors import InputError
from eabf_jax.model.attention.backend import Attention, Backend, with_residuals

_MODULE = "jax._src.cudnn.fused_attention_stablehlo"
# Releases whose module has the names used here; requirements.txt allows no others.
_JAX_VERSIONS = ">=0.10,<0.12"


def _attend(q: Array, k: Array, v: Array, segment_ids: Array | None, even: Attention | None = None) -> Array:
    # The kernel's backward pass rejects odd lengths. Padding comes last, so the causal mask already excludes it.
    length, pad = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    return (even or _attend_even)(q, k, v, ids)[:, :length]


def _attend_token(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    # The function behind `jax.nn.dot_product_attention`, which does not accept the cache's layout.
    attend, padding, one = _private("dot_product_attention"), _private("MaskType").PADDING, jnp.ones_like(lengths)
    out = attend(q[:, :, None], k, v, q_seqlen=one, kv_seqlen=lengths, mask_type=padding, qkv_layout="BNTH")
    return out[:, :, 0]


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Array | None, causal: bool, window: int | None = None
) -> tuple[Array, Array]:
    out, log_sum_exp = _private("_dot_product_attention_fwd_p_wrapper").bind(
        q, k, v, *_operands(q, segment_ids), **_options(segment_ids, causal, window), is_training=True
    )
    return out, log_sum_exp


def _backward(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    causal: bool,
    window: int | None = None,
) -> tuple[Array, Array, Array]:
    operands = _operands(q, segment_ids)
    d_q, d_k, d_v = _private("_dot_product_attention_bwd_p_wrapper").bind(
        q, k, v, *operands, log_sum_exp, out, d_out, **_options(segment_ids, causal, window)
    )
    return d_q, d_k, d_v


def _operands(q: Array, segment_ids: Array | None) -> tuple[Array, ...]:
    """Bias, then lengths, offsets and page tables of queries and keys; unused operands are empty."""
    unused = jnp.zeros(0, q.dtype)
    bias = unused
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        bias = jnp.where(same, 0, _private("get_large_negative_number")(q.dtype)).astype(q.dtype)
    return bias, *(unused,) * 6


def _options(segment_ids: Array | None, causal: bool, window: int | None) -> dict[str, Any]:
    masks = _private("MaskType")
    return {
        "scale": 1.0,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (segment_ids is not None, False),  # has a bias, needs the bias gradient
        "mask_type": masks.CAUSAL if causal else masks.NO_MASK,
        "layout": _private("AttentionLayout").BTNH.value,
        "sliding_window_length": window,
    }


def _private(name: str) -> Any:
    """Returns a name of JAX's private module."""
    try:
        return getattr(importlib.import_module(_MODULE), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"attention backend 'cudnn': JAX {jax.__version__} has no {_MODULE}.{name}; install jax{_JAX_VERSIONS}, or "
            "choose another backend"
        ) from error


def _limits(dtype: jnp.dtype, head_dim: int) -> str | None:
    if jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128:
        return None
    return "bfloat16 or float16 and a head_dim of at most 128 divisible by 8"


_attend_even = with_residuals(_forward, _backward)


@functools.cache
def _windowed(window: int) -> Attention:
    even = with_residuals(functools.partial(_forward, window=window), functools.partial(_backward, window=window))
    return functools.partial(_attend, even=even)


BACKEND = Backend(
    "cudnn",
    _attend,
    platforms=("gpu", "cuda"),
    limits=_limits,
    chunk_multiple=2,  # the backward pass needs even lengths
    forward=_forward,
    backward=_backward,
    token=_attend_token,
    windowed=_windowed,
)
