"""The chunked backend, which never holds all logits at once; test_attention.py compares it on more shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import assert_near, exact, random_qkv, random_segments, with_gradients

from eabf_jax.model.attention import BACKENDS, with_window

chunked, reference = BACKENDS["chunked"], BACKENDS["reference"]


def test_chunked_with_its_own_chunk_size() -> None:
    qkv = random_qkv(1100, 2, 1, 8, batch=1)
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    # The tolerance of test_attention.py, for sums ten times as long.
    assert_near(with_gradients(chunked, qkv, None, d_out), exact(*qkv, None, d_out), 1e-5)


# Windows within a block of 256, at its edges, over several blocks, and beyond the row.
@pytest.mark.parametrize("window", [2, 7, 256, 257, 600, 2000])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_within_a_window(window: int, packed: bool) -> None:
    qkv = random_qkv(700, 2, 1, 8, batch=1)
    segments = random_segments(700, batch=1) if packed else None
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    values = with_gradients(with_window(chunked, window), qkv, segments, d_out)
    assert_near(values, exact(*qkv, segments, d_out, window), 1e-5)


def test_chunked_never_builds_the_whole_matrix() -> None:
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda q, k, v: chunked(q, k, v, None).sum(), (0, 1, 2)))(q, q, q))
    assert f"{length},{length}" not in text
    assert f"{length},{length}" in str(jax.make_jaxpr(reference)(q, q, q, None))
