"""Context parallelism: splits the tokens of a row over devices, with equal shares of the causal attention work.

C devices split a row into 2C chunks, and device r holds chunk r (early) and chunk 2C - 1 - r (late). Their queries see
(r + 1) + (2C - r) = 2C + 1 chunks of keys for every r. The host permutes the tokens before it places them on devices.
It permutes positions (and so the entropy-aware multiplier), targets and masks in the same way, so only attention has to
handle the order. Keys and values are gathered from all devices of the row; queries, outputs and residuals do not move.

Dimensions: as in `model.attention`; C devices (ways) per row, c = T / 2C the length of a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.errors import InputError
from eabf_jax.model.attention import Attention, Backend, ability, joined, named
from eabf_jax.model.attention.backend import Backward, Forward
from eabf_jax.parallel.fsdp import reduce_scatter

_AXIS = "context"


def zigzag_order(length: int, ways: int) -> np.ndarray:
    """Returns the token order in which equal shares of a row have equal attention work.

    Args:
      length: tokens in a row.
      ways: devices that split a row; 1 keeps the row's order.

    Returns:
      int [length]: `row[zigzag_order(...)]` is the row as placed on the devices.
    Raises:
      InputError: the row does not divide into 2 x ways chunks.
    """
    if ways == 1:
        return np.arange(length)
    if length % (2 * ways):
        raise InputError(
            f"rows of {length} tokens do not divide into two chunks for each of mesh context={ways}: "
            f"the window has to be a multiple of {2 * ways}"
        )
    chunks = np.arange(length).reshape(2 * ways, -1)
    return np.stack((chunks[:ways], chunks[: ways - 1 : -1]), axis=1).reshape(-1)


def undo_zigzag_order(length: int, ways: int) -> np.ndarray:
    """Returns the inverse of `zigzag_order`, int [length]: `placed[undo_zigzag_order(...)]` is the row.

    Args:
      length: tokens in a row.
      ways: devices that split a row.

    Raises:
      InputError: as for `zigzag_order`.
    """
    return np.argsort(zigzag_order(length, ways))


def context_attention(mesh: Mesh, backend: Attention, heads: PartitionSpec) -> Attention:
    """Builds attention over rows whose tokens are split over devices in `zigzag_order`.

    Args:
      mesh: a device mesh whose context axis is larger than 1.
      backend: one of `model.attention.BACKENDS`.
      heads: partition of [B, T, N, H] on the mesh.

    Returns:
      A function with the backend's signature for arrays laid out on the mesh. It raises InputError for segment
      ids, and for rows that the backend cannot split.
    Raises:
      InputError: the backend can neither permute queries nor join results by log-sum-exps.
    """
    ways = mesh.shape[_AXIS]
    if not isinstance(backend, Backend):
        raise InputError(f"mesh context={ways} needs an attention backend by name; a function was given: {backend}")
    permuted, multiple = backend.permuted, 2 * ways * backend.chunk_multiple
    parts = None if permuted else _in_parts(ability(backend, "forward"), ability(backend, "backward"), mesh)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, out_specs=heads, check_vma=False)

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
        if segment_ids is not None:
            raise InputError(
                f"mesh context={ways} splits rows of one document; packed rows (pretraining) need context=1"
            )
        length = q.shape[1]
        if length % multiple:
            raise InputError(
                f"rows of {length} tokens cannot be split over mesh context={ways} for attention backend "
                f"{backend.name!r}: the window has to be a multiple of {multiple}"
            )
        if permuted is None:
            return shard_map(parts, in_specs=(heads,) * 3)(q, k, v)
        queries = NamedSharding(mesh, PartitionSpec(heads[2], _AXIS))
        kernel, layout, run = permuted(zigzag_order(length, ways), q.shape[2], queries)

        def whole(kernel: Any, q: Array, k: Array, v: Array) -> Array:
            return run(kernel, q, _gather(k, mesh), _gather(v, mesh))

        return shard_map(whole, in_specs=(layout, *(heads,) * 3))(kernel, q, k, v)

    return attend


def _in_parts(forward: Forward, backward: Backward, mesh: Mesh) -> Callable[[Array, Array, Array], Array]:
    """Builds attention for a device's two query chunks: [B, 2c, N, H], [B, 2c, K, H] twice -> [B, 2c, N, H].

    A causal kernel attends within each chunk and an unmasked one attends to all earlier chunks, so no block is wasted;
    their log-sum-exps join the two softmaxes. In the backward pass, each kernel gets the joined output and log-sum-exp
    and returns the joined softmax's gradients for its own keys. The backward pass gathers keys and values again
    instead of keeping those of the whole row.
    """
    ways = mesh.shape[_AXIS]

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return kept(q, k, v)[0]

    def kept(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
        own, own_lse = forward(_apart(q), _apart(k), _apart(v), None, True)
        branches = [functools.partial(_before, forward, ways, rank) for rank in range(ways)]
        before, before_lse = jax.lax.switch(jax.lax.axis_index(_AXIS), branches, q, _gather(k, mesh), _gather(v, mesh))
        out, lse = named(*joined(_together(own), _statistics_together(own_lse), before, before_lse))
        return out, (q, k, v, out, lse)

    def gradients(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
        q, k, v, out, lse = saved
        own = backward(_apart(q), _apart(k), _apart(v), None, _apart(out), _statistics_apart(lse), _apart(d_out), True)
        branches = [functools.partial(_before_backward, backward, ways, rank) for rank in range(ways)]
        rank = jax.lax.axis_index(_AXIS)
        before = jax.lax.switch(rank, branches, q, _gather(k, mesh), _gather(v, mesh), out, lse, d_out)
        d_q, d_k, d_v = (
            (_together(mine).astype(jnp.float32) + others.astype(jnp.float32)).astype(mine.dtype)
            for mine, others in zip(own, (before[0], _scatter(before[1], mesh), _scatter(before[2], mesh)), strict=True)
        )
        return d_q, d_k, d_v

    attend.defvjp(kept, gradients)
    return attend


def _prefixes(ways: int, rank: int, chunk: int) -> list[tuple[slice, int]]:
    """Returns, for each of a rank's query chunks with earlier keys, its slice on the device and the number of keys."""
    numbers = (rank, 2 * ways - 1 - rank)
    return [(slice(i * chunk, (i + 1) * chunk), number * chunk) for i, number in enumerate(numbers) if number]


def _before(forward: Forward, ways: int, rank: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Attends from a rank's queries to all earlier chunks: out [B, 2c, N, H], log-sum-exp [B, N, 2c]."""
    parts = [
        forward(q[:, place], k[:, :keys], v[:, :keys], None, False)
        for place, keys in _prefixes(ways, rank, q.shape[1] // 2)
    ]
    if len(parts) == 1:
        # The row's first chunk has no keys before it.
        (out, lse), *_ = parts
        parts.insert(0, (jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)))
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def _before_backward(
    backward: Backward, ways: int, rank: int, q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """Computes gradients of `_before` under the joined softmax: d_q of the rank's queries, d_k and d_v of the row."""
    parts = [
        backward(q[:, place], k[:, :keys], v[:, :keys], None, out[:, place], lse[:, :, place], d_out[:, place], False)
        for place, keys in _prefixes(ways, rank, q.shape[1] // 2)
    ]
    d_qs, d_ks, d_vs = zip(*parts, strict=True)
    if len(parts) == 1:
        d_qs = (jnp.zeros_like(d_qs[0]), *d_qs)

    def row(parts: tuple[Array, ...]) -> Array:
        """Sums gradients for prefixes of the row's keys in float32 and rounds once."""
        wide = (x.astype(jnp.float32) for x in parts)
        rests = (((0, 0), (0, k.shape[1] - x.shape[1]), (0, 0), (0, 0)) for x in parts)
        return sum(map(jnp.pad, wide, rests), jnp.float32(0)).astype(k.dtype)

    return jnp.concatenate(d_qs, axis=1), row(d_ks), row(d_vs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
@jax.named_scope("keys_values")
def _gather(x: Array, mesh: Mesh) -> Array:
    """Gathers the devices' chunks into the whole row in natural order: [B, 2c, ...] -> [B, T, ...]."""
    early, late = (jax.lax.all_gather(half, _AXIS, axis=1) for half in jnp.split(x, 2, axis=1))
    chunks = jnp.concatenate((early, jnp.flip(late, axis=1)), axis=1)
    return chunks.reshape(x.shape[0], -1, *x.shape[2:])


@jax.named_scope("key_value_gradients")
def _scatter(x: Array, mesh: Mesh) -> Array:
    """The transpose of `_gather`: sums over the devices; each device keeps its own two chunks."""
    early, late = jnp.split(x.reshape(x.shape[0], 2 * mesh.shape[_AXIS], -1, *x.shape[2:]), 2, axis=1)
    halves = (reduce_scatter(mesh, half, _AXIS, 1) for half in (early, jnp.flip(late, axis=1)))
    return jnp.concatenate(tuple(half[:, 0] for half in halves), axis=1)


_gather.defvjp(lambda x, mesh: (_gather(x, mesh), None), lambda mesh, _, d_row: (_scatter(d_row, mesh),))


def _apart(x: Array) -> Array:
    """Turns the device's two chunks into two rows: [B, 2c, ...] -> [2B, c, ...]."""
    return x.reshape(x.shape[0] * 2, x.shape[1] // 2, *x.shape[2:])


def _together(x: Array) -> Array:
    return x.reshape(x.shape[0] // 2, x.shape[1] * 2, *x.shape[2:])


def _statistics_apart(x: Array) -> Array:
    """[B, N, 2c] -> [2B, N, c]."""
    return _apart(x.swapaxes(1, 2)).swapaxes(1, 2)


def _statistics_together(x: Array) -> Array:
    return _together(x.swapaxes(1, 2)).swapaxes(1, 2)
