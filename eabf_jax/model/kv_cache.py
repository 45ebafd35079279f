"""The key-value cache of one layer, and attention to it.

The token at position p of a row is in slot p, so rows of different lengths need no left padding: a row attends to its
slots up to its current position, and later slots are masked. Dimensions: B batch, T new tokens, S slots, N query heads,
K key-value heads, G = N / K, H head_dim. The slots of a head are contiguous because a decode step reads them in order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from eabf_jax.errors import unknown_name
from eabf_jax.model.attention import Backend, ability, joined, precision_of, with_window
from eabf_jax.model.attention.backend import MASKED

# Dtypes by name; None is the model's compute dtype. Any other 8-bit dtype would need scales, as int8 does.
CACHE_DTYPES = {"model": None, "int8": jnp.int8}

_INT8_MAX = 127.0
# Caches up to this size use XLA's products even if the backend has a kernel. Measured with cuDNN's in a step of a 7B
# model: the products are 1 % faster at 256 slots and slower at 2,304; sizes between these two are not measured.
_FEW_SLOTS = 1024


class LayerCache(NamedTuple):
    """One layer's rotated keys, and its values.

    Attributes:
      k: [B, K, S, H], in the compute dtype or int8.
      v: [B, K, S, H], in the dtype of k.
      k_scale: float32 [B, K, S], the factor of each int8 key; None if k is not quantized.
      v_scale: float32 [B, K, S], the factor of each int8 value; None if v is not quantized.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def empty_cache(
    batch: int, kv_heads: int, slots: int, head_dim: int, compute_dtype: jnp.dtype, kind: str = "model"
) -> LayerCache:
    """Creates an empty cache.

    Args:
      slots: maximum number of tokens per row.
      compute_dtype: the model's compute dtype.
      kind: a name in `CACHE_DTYPES`.

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
    """Returns the cache padded to `slots` slots, at least the number it has."""

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
    backend: Backend,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attends causally within a chunk of new tokens and to all earlier tokens, and stores the chunk.

    A causal kernel attends within the chunk and an unmasked one attends to the cache; their log-sum-exps combine the
    two outputs. No kernel computes a block that is masked out.

    Args:
      q: queries, rotated and scaled.
      k: the chunk's keys, rotated.
      v: the chunk's values.
      cache: holds the earlier tokens.
      start: position of the chunk's first token in every row, known before tracing.
      backend: computes the attention.
      window: the last tokens that a query sees, its own included; None means all.

    Returns:
      The attended values, in the dtype of v, and the cache with the chunk added.
    Raises:
      InputError: a start past 0, and a backend that returns no log-sum-exps; or a window, and a backend without any.
    """
    if window is not None and start + q.shape[1] > window:
        # Rows before the chunk stand in for the queries of the cached tokens that the window reaches; cut off below.
        seen = min(start, window - 1)
        before = (_cached(cache, name, slice(start - seen, start), v.dtype) for name in ("k", "v"))
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(before, (k, v), strict=True))
        q = jnp.pad(q, ((0, 0), (seen, 0), (0, 0), (0, 0)))
        out = with_window(backend, window)(q, keys, values, None)[:, seen:]
    elif start == 0:
        out = backend(q, k, v)
    else:
        forward = ability(backend, "forward")
        own, own_lse = forward(q, k, v, None, True)
        keys, values = (_cached(cache, name, slice(start), v.dtype) for name in ("k", "v"))
        out, _ = joined(own, own_lse, *forward(q, keys, values, None, False))
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
    backend: Backend,
    window: int | None = None,
) -> tuple[Float[Array, "B N H"], LayerCache]:
    """Stores one new token per row and attends to it and all earlier tokens.

    For large caches that are not int8, the backend's kernel (if it has one) reads only the slots in use. In other cases
    all slots are read, because slicing the cache would copy it. The cache should therefore be little larger than
    needed; see `grown`.

    Args:
      q: queries, rotated and scaled.
      k: keys, rotated.
      v: values.
      cache: holds the earlier tokens.
      positions: 0-based position of each row's token, less than the number of slots.
      backend: computes the attention.
      window: the last tokens that a query sees, its own included; None means all.

    Returns:
      The attended values, in the dtype of v, and the cache with the tokens added.
    """
    (new_k, k_scale), (new_v, v_scale) = (_quantized(x, cache.k.dtype) for x in (k, v))
    cache = LayerCache(
        _put(cache.k, new_k, positions),
        _put(cache.v, new_v, positions),
        None if cache.k_scale is None else _put(cache.k_scale, k_scale, positions),
        None if cache.v_scale is None else _put(cache.v_scale, v_scale, positions),
    )
    if backend.platforms == ("tpu",):
        # Without this constraint, the TPU compiler picks another cache layout inside the decode loop to suit the
        # one-slot writes; it then copies the caches on entry and exit and holds both copies.
        cache = cache._replace(k=_as_it_lies(cache.k), v=_as_it_lies(cache.v))
    if window is not None and cache.k.shape[2] <= window:
        window = None
    if backend.token is not None and cache.k_scale is None and cache.k.shape[2] > _FEW_SLOTS and window is None:
        return backend.token(q, cache.k, cache.v, positions + 1), cache
    keys, values = (x.astype(v.dtype) for x in (cache.k, cache.v))
    grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[-1])
    precision = precision_of(q.dtype)
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32, precision=precision)
    if cache.k_scale is not None:
        logits *= cache.k_scale[:, :, None]
    slots, last = jnp.arange(keys.shape[2]), positions[:, None, None, None]
    seen = slots <= last if window is None else (slots <= last) & (slots > last - window)
    weights = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
    if cache.v_scale is not None:
        weights *= cache.v_scale[:, :, None]
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(v.dtype), values, precision=precision)
    return out.reshape(q.shape), cache


def _quantized(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns x in the cache's dtype, and the float32 scale that restores it (the shape of x without the last axis)."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1) / _INT8_MAX
    if dtype != jnp.int8:
        return x.astype(dtype), scale
    return jnp.round(wide / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(dtype), scale


def _as_it_lies(x: Array) -> Array:
    """Constrains x to the default (row-major) layout, which arrays have outside of compiled programs."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _put(stored: Array, new: Array, positions: Array) -> Array:
    """Writes [B, K, ...] into the slots of [B, K, S, ...] at each row's position."""
    if stored.shape[0] == 1:  # a slice update is cheaper than a scatter
        return jax.lax.dynamic_update_slice_in_dim(stored, new[:, :, None], positions[0], 2)
    # Heads are indexed too, because a scatter along axes other than the leading ones would transpose the whole cache.
    rows, heads = jnp.arange(stored.shape[0])[:, None], jnp.arange(stored.shape[1])
    return stored.at[rows, heads, positions[:, None]].set(new, unique_indices=True)


def _cached(cache: LayerCache, name: str, slots: slice, dtype: jnp.dtype) -> Array:
    """Returns the keys or values of some slots in the kernels' layout, [B, slots, K, H]."""
    taken, scale = getattr(cache, name)[:, :, slots], getattr(cache, f"{name}_scale")
    if scale is not None:
        taken = taken.astype(jnp.float32) * scale[:, :, slots, None]
    return taken.astype(dtype).swapaxes(1, 2)
