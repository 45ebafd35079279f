"""Attention by its definition, against which the other backends are tested."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from eabf_jax.model.attention.backend import MASKED, Attention, Backend, precision_of


def attend_at(
    q_index: Int[Array, "T"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with the full matrix of logits, for a subset of a row's queries in any order.

    Args:
      q_index: each query's index in the row; a query sees the keys up to and including that index.
      q: the queries at `q_index`.
      k: the keys of the whole row.
      v: the values of the whole row.
      segment_ids: as for `Backend`; allowed only where `q` holds all queries of the row in order.
      window: the last keys that a query sees, its own included; None means all.
    """
    weights = jax.nn.softmax(_logits(q_index, q, k, segment_ids, window), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision_of(v.dtype)).reshape(q.shape)


def visible(
    q_index: Array, k_index: Array, q_segments: Array | None, k_segments: Array | None, window: int | None = None
) -> Array:
    """Returns an array that is True where a query may see a key, broadcastable to [B, K, G, T, S]."""
    causal = k_index[None, :] <= q_index[:, None]
    if window is not None:
        causal &= k_index[None, :] > q_index[:, None] - window
    if q_segments is None or k_segments is None:
        return causal
    return causal & (q_segments[:, None, None, :, None] == k_segments[:, None, None, None, :])


def _logits(q_index: Array, q: Array, k: Array, segment_ids: Array | None, window: int | None = None) -> Array:
    """Returns masked logits, float32 [B, K, G, T, S]."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32, precision=precision_of(q.dtype)
    )
    return jnp.where(visible(q_index, jnp.arange(k.shape[1]), segment_ids, segment_ids, window), logits, MASKED)


def _attend(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int | None = None) -> Array:
    return attend_at(jnp.arange(q.shape[1]), q, k, v, segment_ids, window)


@functools.cache
def _windowed(window: int) -> Attention:
    return functools.partial(_attend, window=window)


def _forward(q: Array, k: Array, v: Array, segment_ids: Array | None, causal: bool) -> tuple[Array, Array]:
    q_index = jnp.arange(q.shape[1]) if causal else jnp.full(q.shape[1], k.shape[1])
    log_sum_exp = jax.nn.logsumexp(_logits(q_index, q, k, segment_ids), axis=-1)
    return attend_at(q_index, q, k, v, segment_ids), log_sum_exp.reshape(q.shape[0], -1, q.shape[1])


def _permuted(order: np.ndarray, heads: int, sharding: NamedSharding) -> tuple[Any, ...]:
    return jnp.asarray(order), PartitionSpec(sharding.spec[1]), attend_at


BACKEND = Backend("reference", _attend, forward=_forward, permuted=_permuted, windowed=_windowed)
