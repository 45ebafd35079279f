"""The splash kernel (TPU).

Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from eabf_jax.model.attention.backend import CHECKPOINT_NAME, Attention, Backend

# The kernel needs lengths and head sizes that are multiples of the lane count; others are padded.
_LANES = 128
# Largest query and key block.
_BLOCK = 512


def _attend(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int | None = None) -> Array:
    length = q.shape[1]
    return _run(_kernel(tuple(range(length + -length % _LANES)), q.shape[2], window), q, k, v, segment_ids)


@functools.cache
def _windowed(window: int) -> Attention:
    return functools.partial(_attend, window=window)


@functools.cache
def _kernel(
    q_index: tuple[int, ...], heads: int, window: int | None = None, *, head_shards: int = 1, q_shards: int = 1
) -> Any:
    """Builds the kernel for causal attention of queries in any order.

    Args:
      q_index: each query's index in the row; a permutation of 0 ... length - 1, length a multiple of 128.
      window: the last keys that a query sees, its own included; None means all.
      head_shards: number of devices that split the heads.
      q_shards: number of devices that split the queries; each device's share is a multiple of 128.

    Returns:
      A callable pytree that takes q, k and v of one row as [heads, length, H].
    """
    # The import takes longer than importing the whole model, so machines without a TPU skip it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernel

    @functools.cache
    def uniform(value: bool, rows: int, columns: int) -> np.ndarray:
        return np.full((rows, columns), value)

    class Causal(kernel.CausalMask):
        """A causal mask with a fast path for uniform blocks, which are nearly all blocks of a long row."""

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            rows, columns = self.q_sequence[index[0]], range(self.shape[1])[index[1]]
            oldest = rows - (len(q_index) if window is None else window) + 1
            if rows.max() < columns[0] or oldest.min() > columns[-1]:
                return uniform(False, rows.size, len(columns))
            if rows.min() >= columns[-1] and oldest.max() <= columns[0]:
                return uniform(True, rows.size, len(columns))
            return (rows[:, None] >= np.array(columns)) & (oldest[:, None] <= np.array(columns))

    mask = Causal((len(q_index),) * 2)
    mask.q_sequence = np.array(q_index, np.int32)
    if window is not None:
        # Computes the mask of a block inside the kernel.
        mask.mask_function = lambda q_ids, k_ids: (q_ids >= k_ids) & (q_ids - window < k_ids)
    # The largest block that divides a device's queries. Block tables grow with (length / block)^2 and must fit in
    # scalar memory, and the library's default of 128 leaves the matrix unit idle.
    block = math.gcd(len(q_index) // q_shards, _BLOCK)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: Any = dict.fromkeys(names, block)
    # The result is cached per process, so it must not hold tracers of the current trace.
    with jax.ensure_compile_time_eval():
        made = kernel.make_splash_mha(
            kernel.MultiHeadMask([mask] * heads),
            block_sizes=kernel.BlockSizes(**sizes),
            head_shards=head_shards,
            q_seq_shards=q_shards,
            residual_checkpoint_name=CHECKPOINT_NAME,
        )
    return jax.tree.map(np.asarray, made)


def _run(kernel: Any, q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
    """Runs a kernel from `_kernel` on padded rows: [B, T, N, H], [B, S, K, H] twice, [B, T] -> [B, T, N, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, length, _, head_dim = q.shape
    pad_length = (0, -length % _LANES)
    q, k, v = (jnp.pad(x, ((0, 0), pad_length, (0, 0), (0, -head_dim % _LANES))).swapaxes(1, 2) for x in (q, k, v))
    ids = None
    if segment_ids is not None:
        padded = jnp.pad(segment_ids, ((0, 0), pad_length))
        ids = SegmentIds(padded, padded)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)[:, :length, :, :head_dim]


def _permuted(order: np.ndarray, heads: int, sharding: NamedSharding) -> tuple[Any, ...]:
    own_heads, own_queries = sharding.shard_shape((heads, order.size))
    shards = {"head_shards": heads // own_heads, "q_shards": order.size // own_queries}
    kernel = _kernel(tuple(order.tolist()), heads, **shards)
    return kernel, kernel.manual_sharding_spec(sharding), _run


BACKEND = Backend(
    "splash",
    _attend,
    platforms=("tpu",),
    chunk_multiple=_LANES // 2,  # a device's two chunks fill whole lanes
    permuted=_permuted,
    windowed=_windowed,
)
