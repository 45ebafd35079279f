"""The cache and attention to it, against attention in float64 NumPy written here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eabf_jax.errors import InputError
from eabf_jax.model import kv_cache
from eabf_jax.model.attention import BACKENDS
from eabf_jax.model.kv_cache import LayerCache, empty_cache

ROWS, KV_HEADS, GROUPS, HEAD_DIM = 2, 2, 3, 8
# The rounding of float32 products and sums of these sizes, with a margin.
ROUNDING = 2e-5

attend_chunk = jax.jit(kv_cache.attend_chunk, static_argnames=("start", "backend"))
attend_token = jax.jit(functools.partial(kv_cache.attend_token, backend=BACKENDS["chunked"]))


def draw(seed: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    q = generator.normal(size=(ROWS, length, KV_HEADS * GROUPS, HEAD_DIM))
    k, v = generator.normal(size=(2, ROWS, length, KV_HEADS, HEAD_DIM))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def expected_at(q: np.ndarray, k: np.ndarray, v: np.ndarray, index: int) -> np.ndarray:
    """Computes attention of the query at `index` to all keys up to it: [rows, heads, head_dim]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x[:, : index + 1], GROUPS, axis=2) for x in (k, v))
    logits = np.einsum("bnh,bsnh->bns", q[:, index], k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bns,bsnh->bnh", weights / weights.sum(-1, keepdims=True), v)


def read(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, chunk: int, cache: LayerCache, backend: str = "chunked"
) -> tuple[np.ndarray, LayerCache]:
    """Reads whole rows in chunks."""
    outs = []
    for start in range(0, q.shape[1], chunk):
        part = slice(start, start + chunk)
        out, cache = attend_chunk(
            *(jnp.asarray(x[:, part]) for x in (q, k, v)), cache, start=start, backend=BACKENDS[backend]
        )  # fmt: skip
        outs.append(np.asarray(out))
    return np.concatenate(outs, axis=1), cache


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("chunk", [24, 10, 7])
def test_chunks_see_themselves_and_all_before(backend: str, chunk: int) -> None:
    q, k, v = draw(0, 24)
    cache = empty_cache(ROWS, KV_HEADS, 32, HEAD_DIM, jnp.dtype("float32"))
    found, cache = read(q, k, v, chunk, cache, backend)
    for index in range(24):
        np.testing.assert_allclose(found[:, index], expected_at(q, k, v, index), atol=ROUNDING)
    np.testing.assert_array_equal(cache.k[:, :, :24], k.swapaxes(1, 2))
    np.testing.assert_array_equal(cache.v[:, :, :24], v.swapaxes(1, 2))


def test_a_backend_that_cannot_join_a_chunk_with_the_cache_is_refused() -> None:
    q, k, v = draw(0, 8)
    cache = empty_cache(ROWS, KV_HEADS, 16, HEAD_DIM, jnp.dtype("float32"))
    with pytest.raises(
        InputError, match=r"attention backend 'splash' cannot return log-sum-exps.* choose one of cudnn"
    ):
        kv_cache.attend_chunk(*map(jnp.asarray, (q, k, v)), cache, start=8, backend=BACKENDS["splash"])


def test_tokens_of_rows_at_different_positions() -> None:
    """A row must not attend to slots past its position, which hold other tokens or padding."""
    q, k, v = draw(1, 24)
    _, cache = read(q, k, v, 24, empty_cache(ROWS, KV_HEADS, 32, HEAD_DIM, jnp.dtype("float32")))
    new_q, new_k, new_v = draw(2, 1)
    positions = np.array([5, 16])
    found, cache = attend_token(*(jnp.asarray(x[:, 0]) for x in (new_q, new_k, new_v)), cache, jnp.asarray(positions))
    for row, position in enumerate(positions):
        whole = [np.concatenate((old[:, :position], new), axis=1) for old, new in ((k, new_k), (v, new_v))]
        last = np.repeat(new_q, position + 1, axis=1)
        np.testing.assert_allclose(found[row], expected_at(last, *whole, position)[row], atol=ROUNDING)
        np.testing.assert_array_equal(cache.k[row, :, position], new_k[row, 0])
        untouched = np.arange(24) != position
        np.testing.assert_array_equal(cache.v[row][:, :24][:, untouched], v[row].swapaxes(0, 1)[:, untouched])


def test_a_gpu_reads_large_caches_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not run on a CPU, so NumPy stands in for it, as its docstring specifies."""

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        seen = []
        for row, length in enumerate(lengths.tolist()):
            keys, values = (np.asarray(x[row : row + 1, :, :length]).swapaxes(1, 2) for x in (k, v))
            queries = np.repeat(np.asarray(q)[row : row + 1, None], length, axis=1)
            seen.append(expected_at(queries, keys, values, length - 1)[0])
        return jnp.asarray(np.stack(seen), q.dtype)

    backend = dataclasses.replace(BACKENDS["cudnn"], token=kernel)
    monkeypatch.setattr(kv_cache, "_FEW_SLOTS", 16)
    q, k, v = draw(10, 24)
    new = [jnp.asarray(x[:, 0]) for x in draw(11, 1)]
    for slots, kind in ((32, "model"), (32, "int8"), (16, "model")):
        empty = empty_cache(ROWS, KV_HEADS, slots, HEAD_DIM, jnp.dtype("float32"), kind)
        _, cache = read(q[:, :slots], k[:, :slots], v[:, :slots], 8, empty)
        positions = jnp.array([5, slots - 10])
        expected, cache_before = attend_token(*new, cache, positions)
        found, cache_after = kv_cache.attend_token(*new, cache, positions, backend=backend)
        np.testing.assert_allclose(found, expected, atol=ROUNDING)
        jax.tree.map(np.testing.assert_array_equal, cache_after, cache_before)


@pytest.mark.parametrize("kind", ["model", "int8"])
def test_a_grown_cache_holds_the_same_and_has_room(kind: str) -> None:
    q, k, v = draw(8, 12)
    new_q, new_k, new_v = (x[:, 0] for x in draw(9, 1))
    shape = (ROWS, KV_HEADS, 12, HEAD_DIM, jnp.dtype("float32"), kind)
    _, full = read(q, k, v, 12, empty_cache(*shape))
    _, roomy = read(q, k, v, 12, empty_cache(*shape[:2], 32, *shape[3:]))
    grown = kv_cache.grown(full, 32)
    assert all(leaf.shape[2] == 32 for leaf in jax.tree.leaves(grown))
    found, _ = attend_token(new_q, new_k, new_v, grown, jnp.full(ROWS, 12))
    expected, _ = attend_token(new_q, new_k, new_v, roomy, jnp.full(ROWS, 12))
    np.testing.assert_array_equal(found, expected)


def test_one_row_is_written_as_many_are() -> None:
    q, k, v = draw(3, 6)
    new = draw(4, 1)
    outs = []
    for rows in (slice(0, 1), slice(0, 2)):
        cache = empty_cache(len(q[rows]), KV_HEADS, 16, HEAD_DIM, jnp.dtype("float32"))
        _, cache = read(q[rows], k[rows], v[rows], 6, cache)
        out, cache = attend_token(
            *(jnp.asarray(x[rows, 0]) for x in new), cache, jnp.full(len(q[rows]), 6)
        )  # fmt: skip
        outs.append((np.asarray(out)[0], np.asarray(cache.k)[0]))
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=ROUNDING)
    np.testing.assert_array_equal(outs[0][1], outs[1][1])


def test_int8_is_within_half_a_step_of_every_number() -> None:
    q, k, v = draw(5, 24)
    k[0, 3] = 0  # makes its scale zero
    cache = empty_cache(ROWS, KV_HEADS, 32, HEAD_DIM, jnp.dtype("float32"), "int8")
    _, cache = read(q, k, v, 8, cache)
    assert cache.k.dtype == jnp.int8 and cache.k_scale is not None and cache.v_scale is not None
    for stored, scale, x in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        found = np.asarray(stored, np.float64) * np.asarray(scale, np.float64)[..., None]
        step = np.abs(x).max(-1).swapaxes(1, 2)[..., None] / 127
        assert (np.abs(found[:, :, :24] - x.swapaxes(1, 2)) <= 0.5 * step + 1e-7).all()


def test_int8_attends_to_what_it_stores() -> None:
    """Against attention to the dequantised keys and values, only rounding remains."""
    q, k, v = draw(6, 24)
    new_q, new_k, new_v = draw(7, 1)
    kind = (ROWS, KV_HEADS, 32, HEAD_DIM, jnp.dtype("float32"), "int8")
    _, cache = read(q, k, v, 8, empty_cache(*kind))
    found, cache = attend_token(*(jnp.asarray(x[:, 0]) for x in (new_q, new_k, new_v)), cache, jnp.full(ROWS, 24))
    assert cache.k_scale is not None and cache.v_scale is not None
    held_k, held_v = (
        (np.asarray(x, np.float64) * np.asarray(scale, np.float64)[..., None]).swapaxes(1, 2)[:, :25]
        for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    np.testing.assert_allclose(found, expected_at(np.repeat(new_q, 25, 1), held_k, held_v, 24), atol=ROUNDING)
    # Attention to the exact values is close: for values near 1, a step is about 3 standard deviations / 127.
    exact = expected_at(
        np.repeat(new_q, 25, 1), np.concatenate((k, new_k), 1), np.concatenate((v, new_v), 1), 24
    )  # fmt: skip
    assert 1e-5 < np.abs(found - exact).max() < 0.1
    # A later chunk reads the same values from the cache.
    chunk_q, chunk_k, chunk_v = draw(8, 8)
    out, _ = attend_chunk(*map(jnp.asarray, (chunk_q, chunk_k, chunk_v)), cache, start=24, backend=BACKENDS["chunked"])
    whole = [np.concatenate((held[:, :24], new), 1) for held, new in ((held_k, chunk_k), (held_v, chunk_v))]
    padded = np.concatenate((np.zeros_like(q), chunk_q), 1)
    np.testing.assert_allclose(out[:, -1], expected_at(padded, *whole, 31), atol=ROUNDING)


def test_an_unknown_kind_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown kind of cache 'int-8': did you mean 'int8'"):
        empty_cache(1, 1, 1, 8, jnp.dtype("float32"), "int-8")
