"""Keys and values of the tokens read so far, one cache a layer, and attention to them.

A row's token at position p lies in slot p, so rows of different lengths need no padding before them: a row sees its
slots up to its own position, and what lies beyond is never read. Dimensions: B batch, T new tokens, S slots, N query
heads, K key-value heads, G = N / K, H head_dim. A head's slots lie side by side, which is the order that a decode step
reads them in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from eabf_jax.errors import unknown_name
from eabf_jax.model.attention import BACKENDS, KERNELS, cudnn_token, precision_of

# Dtypes by name; None is the model's compute dtype. Another dtype of 8 bits needs scales as int8 does.
CACHE_DTYPES = {"model": None, "int8": jnp.int8}

# exp() of this is 0 in float32, while a row with nothing but masked entries stays free of NaN.
_MASKED = -1e30
_INT8_MAX = 127.0
# Up to here XLA's own products are taken: 1 % of a 7B step quicker at 256 slots, slower at 2,304, not measured between.
_FEW_SLOTS = 1024


class LayerCache(NamedTuple):
    """One layer's keys, rotated already, and values.

    Attributes:
      k: [B, K, S, H], in the compute dtype or int8.
      v: likewise.
      k_scale: float32 [B, K, S], what an int8 key is multiplied with; None where k holds the keys themselves.
      v_scale: likewise.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def empty_cache(
    batch: int, kv_heads: int, slots: int, head_dim: int, compute_dtype: jnp.dtype, kind: str = "model"
) -> LayerCache:
    """A cache with nothing in it yet.

    Args:
      batch: rows.
      kv_heads: key-value heads.
      slots: tokens that a row may come to have.
      head_dim: size of one head.
      compute_dtype: the model's.
      kind: a name in `CACHE_DTYPES`.

    Returns:
      The cache.
    Raises:
      InputError: unknown kind.
    """
    if kind not in CACHE_DTYPES:
        raise unknown_name("kind of cache", kind, CACHE_DTYPES)
    dtype = CACHE_DTYPES[kind]
    zeros = jnp.zeros((batch, kv_heads, slots, head_dim), dtype or compute_dtype)
    if dtype is None:
        return LayerCache(zeros, jnp.zeros_like(zeros))
    scales = jnp.zeros((batch, kv_heads, slots), jnp.float32)
    return LayerCache(zeros, jnp.zeros_like(zeros), scales, jnp.zeros_like(scales))


def grown(cache: LayerCache, slots: int) -> LayerCache:
    """The same tokens in a cache of more slots.

    Args:
      cache: of at most so many slots.
      slots: to have.

    Returns:
      The cache.
    """

    def longer(x: Array) -> Array:
        more = slots - x.shape[2]
        return jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)])

    return jax.tree.map(longer, cache)


def attend_chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cache: LayerCache,
    *,
    start: int,
    backend: str,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attends causally within a chunk of new tokens and to all before it, and stores the chunk.

    The chunk sees itself through a causal kernel and what is cached through an unmasked one, joined by their
    log-sum-exps: no kernel computes a block that is masked out.

    Args:
      q: queries, rotated and scaled.
      k: the chunk's keys, rotated.
      v: its values.
      cache: holds the tokens before.
      start: position of the chunk's first token in every row, known before tracing.
      backend: a name in `attention.BACKENDS`.

    Returns:
      The attended values, in the dtype of v, and the cache with the chunk in it.
    """
    if start == 0:
        out = BACKENDS[backend](q, k, v, None)
    else:
        kernel = KERNELS.get(backend, KERNELS["chunked"])
        own, own_lse = kernel.forward(q, k, v, None, True)
        keys, values = (_cached(cache, name, start, v.dtype) for name in ("k", "v"))
        earlier, earlier_lse = kernel.forward(q, keys, values, None, False)
        lse = jnp.logaddexp(own_lse, earlier_lse)
        out = (own * _weight(own_lse - lse) + earlier * _weight(earlier_lse - lse)).astype(v.dtype)
    places = (0, 0, start, 0)
    (new_k, k_scale), (new_v, v_scale) = (_quantized(x.swapaxes(1, 2), cache.k.dtype) for x in (k, v))
    stored = LayerCache(
        jax.lax.dynamic_update_slice(cache.k, new_k, places),
        jax.lax.dynamic_update_slice(cache.v, new_v, places),
        None if cache.k_scale is None else jax.lax.dynamic_update_slice(cache.k_scale, k_scale, places[:3]),
        None if cache.v_scale is None else jax.lax.dynamic_update_slice(cache.v_scale, v_scale, places[:3]),
    )
    return out, stored


def attend_token(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cache: LayerCache,
    positions: Int[Array, "B"],
    *,
    backend: str,
) -> tuple[Float[Array, "B N H"], LayerCache]:
    """Stores each row's one new token and attends to it and all before it.

    cuDNN's kernel reads the slots in use, of large caches that are not int8. Elsewhere all are read: a part of them
    would be a copy. So a cache should hold few more than are in use; see `grown`.

    Args:
      q: queries, rotated and scaled.
      k: keys, rotated.
      v: values.
      cache: holds the tokens before.
      positions: where each row's token stands, less than the number of slots.
      backend: a name in `attention.BACKENDS`.

    Returns:
      The attended values, in the dtype of v, and the cache with the tokens in it.
    """
    (new_k, k_scale), (new_v, v_scale) = (_quantized(x, cache.k.dtype) for x in (k, v))
    cache = LayerCache(
        _put(cache.k, new_k, positions),
        _put(cache.v, new_v, positions),
        None if cache.k_scale is None else _put(cache.k_scale, k_scale, positions),
        None if cache.v_scale is None else _put(cache.v_scale, v_scale, positions),
    )
    if backend == "splash":
        # For its writes of one slot, the TPU's compiler would else have the caches in another layout within the loop of
        # tokens, copy them there and back, and hold both.
        cache = cache._replace(k=_as_it_lies(cache.k), v=_as_it_lies(cache.v))
    if backend == "cudnn" and cache.k_scale is None and cache.k.shape[2] > _FEW_SLOTS:
        return cudnn_token(q, cache.k, cache.v, positions + 1), cache
    keys, values = (x.astype(v.dtype) for x in (cache.k, cache.v))
    grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
    precision = precision_of(q.dtype)
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32, precision=precision)
    if cache.k_scale is not None:
        logits *= cache.k_scale[:, :, None]
    seen = jnp.arange(keys.shape[2]) <= positions[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(seen, logits, _MASKED), axis=-1)
    if cache.v_scale is not None:
        weights *= cache.v_scale[:, :, None]
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(v.dtype), values, precision=precision)
    return out.reshape(q.shape), cache


def _quantized(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """x as the cache stores it, and what it is then to be multiplied with: float32, without the last axis."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / _INT8_MAX
    if dtype != jnp.int8:
        return x.astype(dtype), scale
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(dtype), scale


def _as_it_lies(x: Array) -> Array:
    """x in the layout that arrays have between programs."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _put(stored: Array, new: Array, positions: Array) -> Array:
    """Writes [B, K, ...] into the slots of [B, K, S, ...] at each row's position."""
    if stored.shape[0] == 1:  # a slice rather than a scatter
        return jax.lax.dynamic_update_slice_in_dim(stored, new[:, :, None], positions[0], 2)
    # Heads are indexed too: a scatter along axes that are not the first ones would transpose the whole cache.
    rows, heads = jnp.arange(stored.shape[0])[:, None], jnp.arange(stored.shape[1])
    return stored.at[rows, heads, positions[:, None]].set(new, unique_indices=True)


def _cached(cache: LayerCache, name: str, slots: int, dtype: jnp.dtype) -> Array:
    """Keys or values of the first slots as kernels take them: [B, slots, K, H]."""
    taken, scale = getattr(cache, name)[:, :, :slots], getattr(cache, f"{name}_scale")
    if scale is not None:
        taken = taken.astype(jnp.float32) * scale[:, :, :slots, None]
    return taken.astype(dtype).swapaxes(1, 2)


def _weight(log_share: Array) -> Array:
    """[B, N, T] -> [B, T, N, 1]: what one part's output counts for."""
    return jnp.exp(log_share).swapaxes(1, 2)[..., None]
