"""Attention block by block with an online softmax; memory is linear in T, and blocks that are masked out are skipped.

Source: "FlashAttention-2" (Dao, 2023), algorithms 1 and 2, in plain JAX for any device.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from eabf_jax.model.attention.backend import MASKED, Attention, Backend, precision_of, with_residuals
from eabf_jax.model.attention.reference import visible

# Query and key block size: the fastest of 128 to 1024 on CPU, for rows of 2,048 tokens.
_CHUNK = 256


class _Blocks:
    """Splits the chunked kernel's [T, S] logits into blocks and masks them."""

    def __init__(self, length: int, keys: int, causal: bool, window: int | None):
        self.length, self.keys, self.causal, self.window = length, keys, causal, window
        self.q_size, self.k_size = min(_CHUNK, length), min(_CHUNK, keys)
        self.q_count, self.k_count = -(-length // self.q_size), -(-keys // self.k_size)

    def queries(self, x: Array, kv_heads: int) -> Array:
        """[B, T, N, H] -> [B, K, G, padded T, H]."""
        x = jnp.pad(x, ((0, 0), (0, self.q_count * self.q_size - self.length), (0, 0), (0, 0)))
        return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)

    def from_queries(self, x: Array) -> Array:
        """[B, K, G, padded T, H] -> [B, T, N, H]."""
        x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, : self.length]

    def key_values(self, x: Array) -> Array:
        """[B, S, K, H] -> [B, K, padded S, H]."""
        return jnp.pad(x, ((0, 0), (0, self.k_count * self.k_size - self.keys), (0, 0), (0, 0))).swapaxes(1, 2)

    def from_key_values(self, x: Array) -> Array:
        """[B, K, padded S, H] -> [B, S, K, H]."""
        return x.swapaxes(1, 2)[:, : self.keys]

    def statistics(self, x: Array, kv_heads: int) -> Array:
        """[B, N, T] -> [B, K, G, padded T]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.q_count * self.q_size - self.length)))
        return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])

    def segments(self, ids: Array | None) -> Array | None:
        return None if ids is None else jnp.pad(ids, ((0, 0), (0, self.q_count * self.q_size - self.length)))

    def logits(self, q_i: Array, k_j: Array, segments: Array | None, i: Array, j: Array) -> Array:
        """Masked logits of query block i against key block j: [B, K, G, q_size, k_size]."""
        k_index = j * self.k_size + jnp.arange(self.k_size)
        if self.causal:
            # Padding comes after every real query, so the causal mask already excludes it.
            q_index = i * self.q_size + jnp.arange(self.q_size)
            of_query, of_key = (None if segments is None else _block(segments, n, self.q_size, 1) for n in (i, j))
            mask = visible(q_index, k_index, of_query, of_key, self.window)
        else:
            mask = k_index < self.keys
        return jnp.where(mask, _dot("bkgth,bksh->bkgts", q_i, k_j), MASKED)

    def keys_of(self, i: Array) -> tuple[Array | int, Array | int]:
        """First key block that query block i sees, and the end."""
        if not self.causal:
            return 0, self.k_count
        return 0 if self.window is None else jnp.maximum(i * self.q_size - self.window + 1, 0) // self.k_size, i + 1

    def queries_of(self, j: Array) -> tuple[Array | int, Array | int]:
        """First query block that sees key block j, and the end."""
        if not self.causal:
            return 0, self.q_count
        if self.window is None:
            return j, self.q_count
        return j, jnp.minimum(((j + 1) * self.k_size + self.window - 2) // self.q_size + 1, self.q_count)


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Array | None, causal: bool, window: int | None = None
) -> tuple[Array, Array]:
    blocks, kv_heads = _Blocks(q.shape[1], k.shape[1], causal, window), k.shape[2]
    q, k, v = blocks.queries(q, kv_heads), blocks.key_values(k), blocks.key_values(v)
    segments = blocks.segments(segment_ids)

    def query_block(i: Array) -> tuple[Array, Array]:
        q_i = _block(q, i, blocks.q_size, 3)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, largest, weighted = carry
            logits = blocks.logits(q_i, _block(k, j, blocks.k_size, 2), segments, i, j)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            update = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), _block(v, j, blocks.k_size, 2))
            return total * shrink + weights.sum(-1), new_largest, weighted * shrink[..., None] + update

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = (zeros[..., 0], jnp.full(q_i.shape[:-1], MASKED, jnp.float32), zeros)
        total, largest, weighted = jax.lax.fori_loop(*blocks.keys_of(i), key_block, start)
        return (weighted / total[..., None]).astype(v.dtype), largest + jnp.log(total)

    out, log_sum_exp = jax.lax.map(query_block, jnp.arange(blocks.q_count))
    log_sum_exp = _join(log_sum_exp[..., None])[..., 0]
    log_sum_exp = log_sum_exp.reshape(log_sum_exp.shape[0], -1, log_sum_exp.shape[-1])
    return blocks.from_queries(_join(out)), log_sum_exp[..., : blocks.length]


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
    blocks, kv_heads = _Blocks(q.shape[1], k.shape[1], causal, window), k.shape[2]
    # Row sums of weights * d_weights, which the derivative of softmax subtracts.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta, log_sum_exp = blocks.statistics(delta, kv_heads), blocks.statistics(log_sum_exp, kv_heads)
    q, d_out = blocks.queries(q, kv_heads), blocks.queries(d_out, kv_heads)
    k, v = blocks.key_values(k), blocks.key_values(v)
    segments = blocks.segments(segment_ids)

    def key_block(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j = _block(k, j, blocks.k_size, 2), _block(v, j, blocks.k_size, 2)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k_j, d_v_j = carry
            q_i, d_out_i = _block(q, i, blocks.q_size, 3), _block(d_out, i, blocks.q_size, 3)
            logits = blocks.logits(q_i, k_j, segments, i, j)
            weights = jnp.exp(logits - _block(log_sum_exp, i, blocks.q_size, 3)[..., None])
            d_v_j += _dot("bkgth,bkgts->bkhs", d_out_i, weights.astype(v.dtype))
            d_weights = _dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = (weights * (d_weights - _block(delta, i, blocks.q_size, 3)[..., None])).astype(q.dtype)
            d_k_j += _dot("bkgth,bkgts->bkhs", q_i, d_logits)
            d_q_i = _block(d_q, i, blocks.q_size, 3) + _dot("bkgts,bksh->bkgth", d_logits, k_j)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * blocks.q_size, 3), d_k_j, d_v_j

        # These sums have head_dim first: with it last, XLA would transpose the large [t, s] operand in each product.
        zeros = jnp.zeros(k_j.mT.shape, jnp.float32)
        d_q, d_k_j, d_v_j = jax.lax.fori_loop(*blocks.queries_of(j), query_block, (d_q, zeros, zeros))
        return d_q, (d_k_j.mT, d_v_j.mT)

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks.k_count))
    return (
        blocks.from_queries(d_q.astype(q.dtype)),
        blocks.from_key_values(_join(d_k).astype(k.dtype)),
        blocks.from_key_values(_join(d_v).astype(v.dtype)),
    )


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _join(blocks: Array) -> Array:
    """[blocks, ..., size, H] -> [..., blocks * size, H]."""
    moved = jnp.moveaxis(blocks, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=precision_of(a.dtype))


@functools.cache
def _windowed(window: int) -> Attention:
    return with_residuals(functools.partial(_forward, window=window), functools.partial(_backward, window=window))


BACKEND = Backend(
    "chunked", with_residuals(_forward, _backward), forward=_forward, backward=_backward, windowed=_windowed
)
