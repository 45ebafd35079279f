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
from eabf_jax.model.attention import (
    BACKENDS,
    KERNELS,
    SPLASH_LANES,
    Attention,
    Kernel,
    named,
    reference,
    reference_at,
    run_splash,
    splash,
    splash_kernel,
)
from eabf_jax.parallel.fsdp import reduce_scatter

_AXIS = "context"
# A chunk's length must be a multiple of this: cuDNN's backward pass needs even lengths, splash full lanes per device.
_CHUNK_MULTIPLE = {BACKENDS["cudnn"]: 2, splash: SPLASH_LANES // 2}


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


def context_attention(mesh: Mesh, attention: Attention, heads: PartitionSpec) -> Attention:
    """Builds attention over rows whose tokens are split over devices in `zigzag_order`.

    Args:
      mesh: a device mesh whose context axis is larger than 1.
      attention: a function of `model.attention.BACKENDS`.
      heads: partition of [B, T, N, H] on the mesh.

    Returns:
      A function with the signature of `reference` for arrays laid out on the mesh. It raises InputError for segment
      ids, and for rows that the backend cannot split.
    """
    ways = mesh.shape[_AXIS]
    shard_map = functools.partial(jax.shard_map, mesh=mesh, out_specs=heads, check_vma=False)

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
        if segment_ids is not None:
            raise InputError(
                f"mesh context={ways} splits rows of one document; packed rows (pretraining) need context=1"
            )
        length, multiple = q.shape[1], 2 * ways * _CHUNK_MULTIPLE.get(attention, 1)
        if length % multiple:
            raise InputError(
                f"rows of {length} tokens cannot be split over mesh context={ways} for this attention backend: "
                f"the window has to be a multiple of {multiple}"
            )
        if attention is splash:
            order = tuple(zigzag_order(length, ways).tolist())
            kernel = splash_kernel(order, q.shape[2], head_shards=mesh.shape["tensor"], q_shards=ways)
            layout = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads[2], _AXIS)))
            return shard_map(functools.partial(_splash, mesh), in_specs=(layout, *(heads,) * 3))(kernel, q, k, v)
        local = _reference(mesh) if attention is reference else _joined(_kernel_of(attention), mesh)
        return shard_map(local, in_specs=(heads,) * 3)(q, k, v)

    return attend


def _kernel_of(attention: Attention) -> Kernel:
    return next(KERNELS[name] for name, backend in BACKENDS.items() if backend is attention)


def _splash(mesh: Mesh, kernel: Any, q: Array, k: Array, v: Array) -> Array:
    head_dim = q.shape[-1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -head_dim % SPLASH_LANES))) for x in (q, k, v))
    return run_splash(kernel, q, _gather(k, mesh), _gather(v, mesh))[..., :head_dim]


def _reference(mesh: Mesh) -> Callable[[Array, Array, Array], Array]:
    def attend(q: Array, k: Array, v: Array) -> Array:
        ways, rank, chunk = mesh.shape[_AXIS], jax.lax.axis_index(_AXIS), jnp.arange(q.shape[1] // 2)
        q_index = jnp.concatenate((rank * chunk.size + chunk, (2 * ways - 1 - rank) * chunk.size + chunk))
        return reference_at(q_index, q, _gather(k, mesh), _gather(v, mesh))

    return attend


def _joined(kernel: Kernel, mesh: Mesh) -> Callable[[Array, Array, Array], Array]:
    """Builds attention for a device's two query chunks: [B, 2c, N, H], [B, 2c, K, H] twice -> [B, 2c, N, H].

    A causal kernel attends within each chunk and an unmasked one attends to all earlier chunks, so no block is wasted;
    their log-sum-exps join the two softmaxes. In the backward pass, each kernel gets the joined output and log-sum-exp
    and returns the joined softmax's gradients for its own keys. The backward pass gathers keys and values again
    instead of keeping those of the whole row.
    """
    ways = mesh.shape[_AXIS]

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return forward(q, k, v)[0]

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
        own, own_lse = kernel.forward(_apart(q), _apart(k), _apart(v), None, True)
        branches = [functools.partial(_before, kernel, ways, rank) for rank in range(ways)]
        before, before_lse = jax.lax.switch(jax.lax.axis_index(_AXIS), branches, q, _gather(k, mesh), _gather(v, mesh))
        own, own_lse = _together(own), _statistics_together(own_lse)
        lse = jnp.logaddexp(own_lse, before_lse)
        out = own * _weight(own_lse - lse) + before * _weight(before_lse - lse)
        out, lse = named(out.astype(v.dtype), lse)
        return out, (q, k, v, out, lse)

    def backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
        q, k, v, out, lse = saved
        own = kernel.backward(
            _apart(q), _apart(k), _apart(v), None, _apart(out), _statistics_apart(lse), _apart(d_out), True
        )
        branches = [functools.partial(_before_backward, kernel, ways, rank) for rank in range(ways)]
        rank = jax.lax.axis_index(_AXIS)
        before = jax.lax.switch(rank, branches, q, _gather(k, mesh), _gather(v, mesh), out, lse, d_out)
        d_q, d_k, d_v = (
            (_together(mine).astype(jnp.float32) + others.astype(jnp.float32)).astype(mine.dtype)
            for mine, others in zip(own, (before[0], _scatter(before[1], mesh), _scatter(before[2], mesh)), strict=True)
        )
        return d_q, d_k, d_v

    attend.defvjp(forward, backward)
    return attend


def _prefixes(ways: int, rank: int, chunk: int) -> list[tuple[slice, int]]:
    """Returns, for each of a rank's query chunks with earlier keys, its slice on the device and the number of keys."""
    numbers = (rank, 2 * ways - 1 - rank)
    return [(slice(i * chunk, (i + 1) * chunk), number * chunk) for i, number in enumerate(numbers) if number]


def _before(kernel: Kernel, ways: int, rank: int, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Attends from a rank's queries to all earlier chunks: out [B, 2c, N, H], log-sum-exp [B, N, 2c]."""
    parts = [
        kernel.forward(q[:, place], k[:, :keys], v[:, :keys], None, False)
        for place, keys in _prefixes(ways, rank, q.shape[1] // 2)
    ]
    if len(parts) == 1:
        # The row's first chunk has no keys before it.
        (out, lse), *_ = parts
        parts.insert(0, (jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)))
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def _before_backward(
    kernel: Kernel, ways: int, rank: int, q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """Computes gradients of `_before` under the joined softmax: d_q of the rank's queries, d_k and d_v of the row."""
    parts = [
        kernel.backward(
            q[:, place], k[:, :keys], v[:, :keys], None, out[:, place], lse[:, :, place], d_out[:, place], False
        )
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


def _weight(log_share: Array) -> Array:
    """Turns a log weight [B, N, T] into a weight [B, T, N, 1] for one part's output."""
    return jnp.exp(log_share).swapaxes(1, 2)[..., None]
