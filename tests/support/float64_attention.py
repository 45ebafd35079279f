"""Attention in float64 NumPy, one head of one row at a time, and the inputs of comparisons with it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_qkv(length: int, heads: int, kv_heads: int, head_dim: int, batch: int = 2) -> QKV:
    """Draws queries, keys and values whose logits have a standard deviation of about 2."""
    generator = np.random.default_rng(length)
    q, k, v = (
        generator.normal(size=(batch, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    return q * np.float32(2 / math.sqrt(head_dim)), k, v


def random_segments(length: int, batch: int = 2) -> np.ndarray:
    """Packs each row differently, with padding (segment 0) at the end of the first."""
    generator = np.random.default_rng(length)
    rows = []
    for _ in range(batch):
        borders = np.sort(generator.choice(np.arange(1, length), 3, replace=False))
        rows.append(np.searchsorted(borders, np.arange(length), side="right") + 1)
    rows[0][rows[0] == 4] = 0
    return np.stack(rows).astype(np.int32)


def exact(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segments: np.ndarray | None,
    d_out: np.ndarray,
    window: int | None = None,
) -> list[Any]:
    """Computes the output and the gradients of sum(out * d_out) in float64; a query sees the last `window` keys."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        seen = np.tri(q.shape[1], dtype=bool)
        if window is not None:
            seen &= ~np.tri(q.shape[1], k=-window, dtype=bool)
        if segments is not None:
            seen &= segments[b][:, None] == segments[b][None, :]
        for n in range(q.shape[2]):
            m = n // group
            logits = np.where(seen, q[b, :, n] @ k[b, :, m].T, -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, m]
            d_weights = d_out[b, :, n] @ v[b, :, m].T
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            d_q[b, :, n] = d_logits @ k[b, :, m]
            d_k[b, :, m] += d_logits.T @ q[b, :, n]
            d_v[b, :, m] += weights.T @ d_out[b, :, n]
    return [out, d_q, d_k, d_v]


def with_gradients(backend: Any, qkv: Any, segments: np.ndarray | None, d_out: np.ndarray) -> list[jax.Array]:
    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(lambda q, k, v: backend(q, k, v, segments), q, k, v)
        return out, back(jnp.asarray(d_out, out.dtype))

    out, gradients = run(*qkv)
    return [out, *gradients]


def assert_near(values: list[Any], expected: list[Any], tolerance: float) -> None:
    for name, value, wanted in zip(("out", "d_q", "d_k", "d_v"), values, expected, strict=True):
        value = np.asarray(value, np.float64)
        assert value.shape == wanted.shape
        error = np.abs(value - wanted).max() / np.abs(wanted).max()
        assert error < tolerance, f"{name}: {error:.2e}"
