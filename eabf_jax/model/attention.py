"""Causal self-attention behind one function, with a backend for each kind of device.

Dimensions, here and in `llama.py`: B batch, T length, N query heads, K key-value heads (N is a multiple of K),
G = N / K, H head_dim. A new kernel is one more function with the signature of `reference` and one line in `BACKENDS`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError, unknown_name

Attention = Callable[[Array, Array, Array, Array | None], Array]

# exp() of this is 0 in float32, while a row with nothing but masked entries stays free of NaN.
_MASKED = -1e30
# What a backend gives its backward pass, beside its inputs, carries this name, so that a remat policy can keep it.
_CHECKPOINT_NAME = "attention_output"
# Query and key block of the chunked backend: measured fastest of 128 to 1024 on CPU, for rows of 2,048 tokens.
_CHUNK = 256


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with the full [T, T] matrix of logits: the definition that the other backends are tested against.

    Args:
      q: queries, already rotated and scaled (1/sqrt(head_dim) and the scheme's logit multiplier included).
      k: keys, already rotated.
      v: values.
      segment_ids: tokens attend only within their own segment; None is one segment.

    Returns:
      The attended values, in the dtype of `v`; softmax is taken in float32.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32, precision=precision_of(q.dtype)
    )
    mask = _mask(jnp.arange(length), jnp.arange(length), segment_ids, segment_ids)
    weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision_of(v.dtype))
    return out.reshape(batch, length, heads, head_dim)


def chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends block by block with an online softmax: memory linear in T, blocks above the diagonal never computed.

    Args and Returns: as `reference`.
    Source: "FlashAttention-2" (Dao, 2023), algorithms 1 and 2, in plain JAX for any device.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    chunk = min(_CHUNK, length)
    # Padding comes after every real query, so causality alone keeps it out.
    pad = -length % chunk
    segments = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    segments = jnp.pad(segments, ((0, 0), (0, pad)))

    def head_major(x: Array, per_group: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return x.reshape(batch, length + pad, kv_heads, per_group, head_dim).transpose(0, 2, 3, 1, 4)

    out = _flash(
        head_major(q, heads // kv_heads), head_major(k, 1)[:, :, 0], head_major(v, 1)[:, :, 0], segments, chunk
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length + pad, heads, head_dim)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: Array, k: Array, v: Array, segments: Array, chunk: int) -> Array:
    """q [B, K, G, T, H], k and v [B, K, T, H], segments [B, T], T a multiple of chunk -> [B, K, G, T, H]."""
    return _flash_forward(q, k, v, segments, chunk)[0]


def _flash_forward(q: Array, k: Array, v: Array, segments: Array, chunk: int) -> tuple[Array, tuple[Array, ...]]:
    def query_block(i: Array) -> tuple[Array, Array]:
        q_i, segments_i = _block(q, i, chunk, 3), _block(segments, i, chunk, 1)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, largest, weighted = carry
            logits = _block_logits(q_i, _block(k, j, chunk, 2), segments_i, _block(segments, j, chunk, 1), i, j)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            v_j = _block(v, j, chunk, 2)
            update = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j)
            return (
                total * shrink + weights.sum(-1),
                new_largest,
                weighted * shrink[..., None] + update,
            )

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = (zeros[..., 0], jnp.full(q_i.shape[:-1], _MASKED, jnp.float32), zeros)
        total, largest, weighted = jax.lax.fori_loop(0, i + 1, key_block, start)
        return (weighted / total[..., None]).astype(v.dtype), largest + jnp.log(total)

    blocks = jnp.arange(q.shape[3] // chunk)
    out, log_sum_exp = jax.lax.map(query_block, blocks)
    # Named here too: what the backward pass needs are these very arrays, not what the caller makes of them.
    out, log_sum_exp = (
        checkpoint_name(x, _CHECKPOINT_NAME) for x in (_join(out), _join(log_sum_exp[..., None])[..., 0])
    )
    return out, (q, k, v, segments, out, log_sum_exp)


def _flash_backward(chunk: int, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sum_exp = saved
    blocks = q.shape[3] // chunk
    # Row sums of weights * d_weights: what the softmax's own derivative subtracts.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def key_block(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j, segments_j = _block(k, j, chunk, 2), _block(v, j, chunk, 2), _block(segments, j, chunk, 1)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k_j, d_v_j = carry
            q_i, d_out_i = _block(q, i, chunk, 3), _block(d_out, i, chunk, 3)
            logits = _block_logits(q_i, k_j, _block(segments, i, chunk, 1), segments_j, i, j)
            weights = jnp.exp(logits - _block(log_sum_exp, i, chunk, 3)[..., None])
            d_v_j += _dot("bkgth,bkgts->bkhs", d_out_i, weights.astype(v.dtype))
            d_weights = _dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = (weights * (d_weights - _block(delta, i, chunk, 3)[..., None])).astype(q.dtype)
            d_k_j += _dot("bkgth,bkgts->bkhs", q_i, d_logits)
            d_q_i = _block(d_q, i, chunk, 3) + _dot("bkgts,bksh->bkgth", d_logits, k_j)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * chunk, 3), d_k_j, d_v_j

        # Summed head-size first: the other way round XLA would transpose the large [t, s] operand for each product.
        zeros = jnp.zeros(k_j.mT.shape, jnp.float32)
        d_q, d_k_j, d_v_j = jax.lax.fori_loop(j, blocks, query_block, (d_q, zeros, zeros))
        return d_q, (d_k_j.mT, d_v_j.mT)

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks))
    return d_q.astype(q.dtype), _join(d_k).astype(k.dtype), _join(d_v).astype(v.dtype), None


_flash.defvjp(_flash_forward, _flash_backward)


def _block(x: Array, index: Array, chunk: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, axis)


def _join(blocks: Array) -> Array:
    """[blocks, ..., chunk, H] -> [..., blocks * chunk, H]."""
    moved = jnp.moveaxis(blocks, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def _block_logits(q: Array, k: Array, q_segments: Array, k_segments: Array, i: Array, j: Array) -> Array:
    """Masked logits of query block i against key block j: [B, K, G, chunk, chunk]."""
    chunk = jnp.arange(q.shape[3])
    mask = _mask(i * q.shape[3] + chunk, j * q.shape[3] + chunk, q_segments, k_segments)
    return jnp.where(mask, _dot("bkgth,bksh->bkgts", q, k), _MASKED)


def _mask(q_index: Array, k_index: Array, q_segments: Array | None, k_segments: Array | None) -> Array:
    """True where a query may see a key, broadcastable to [B, K, G, T, S]."""
    causal = k_index[None, :] <= q_index[:, None]
    if q_segments is None or k_segments is None:
        return causal
    return causal & (q_segments[:, None, None, :, None] == k_segments[:, None, None, None, :])


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """The precision of matrix products: float32 means float32 on every device.

    Args:
      dtype: the compute dtype.

    Returns:
      HIGHEST for float32, which TPUs and recent GPUs would otherwise round to fewer bits; None for the others.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=precision_of(a.dtype))


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with cuDNN's fused kernel (NVIDIA GPUs, bfloat16 or float16).

    Args and Returns: as `reference`. With segment ids the kernel takes a [B, 1, T, T] mask: meant for the short
    windows of packed pretraining.
    Source: `jax.nn.dot_product_attention`.
    """
    length = q.shape[1]
    # The kernel's backward pass refuses odd lengths. The padding comes last: causality alone keeps it out.
    pad = length % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    mask = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
        mask = ids[:, None, :, None] == ids[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, scale=1.0, implementation="cudnn")
    return out[:, :length]


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with the splash kernel (TPU).

    Args and Returns: as `reference`. The kernel works on whole lanes of 128: shorter heads and lengths are padded.
    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    # Imported here because importing the kernel takes longer than the whole model on machines that never use it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernel

    _, length, heads, head_dim = q.shape
    pad_length, pad_head = -length % 128, -head_dim % 128
    pads = ((0, 0), (0, pad_length), (0, 0), (0, pad_head))
    q, k, v = (jnp.pad(x, pads).swapaxes(1, 2) for x in (q, k, v))
    mask = kernel.MultiHeadMask([kernel.CausalMask((length + pad_length,) * 2) for _ in range(heads)])
    attend = kernel.make_splash_mha_single_device(mask, residual_checkpoint_name=_CHECKPOINT_NAME)
    if segment_ids is None:
        out = jax.vmap(lambda *qkv: attend(*qkv))(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, pad_length)))
        out = jax.vmap(lambda q, k, v, s: attend(q, k, v, kernel.SegmentIds(s, s)))(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :length, :, :head_dim]


BACKENDS: dict[str, Attention] = {"reference": reference, "chunked": chunked, "cudnn": cudnn, "splash": splash}


def select(backend: str, dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """Resolves the backend's name before tracing.

    Args:
      backend: a name in `BACKENDS`, or "auto" for the best one that the platform, dtype and head size allow.
      dtype: the compute dtype.
      head_dim: size of one head.
      platform: "cpu", "gpu" or "tpu"; None asks JAX for the default backend.

    Returns:
      A name in `BACKENDS`.
    Raises:
      InputError: unknown name, or cuDNN asked for a dtype or head size that it does not take.
    """
    fits_cudnn = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if backend == "auto":
        platform = platform or jax.default_backend()
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "chunked"
    if backend not in BACKENDS:
        raise unknown_name("attention backend", backend, [*BACKENDS, "auto"])
    if backend == "cudnn" and not fits_cudnn:
        raise InputError(
            f"attention backend 'cudnn' takes bfloat16 or float16 and a head_dim of at most 128 divisible by 8, not "
            f"{jnp.dtype(dtype).name} and {head_dim}; 'chunked' takes any"
        )
    return backend
