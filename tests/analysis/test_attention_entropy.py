"""Attention entropy against float64 NumPy, and against the attention weights that transformers returns."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family import FULL, SIZES, TOKENS, in_transformers
from float64_attention import random_qkv

from eabf_jax.analysis.attention_entropy import (
    Entropies,
    attention_entropy,
    by_head,
    by_layer,
    drift,
    entropies,
    matched,
    row_entropies,
)
from eabf_jax.errors import InputError
from eabf_jax.interop.loading import load
from eabf_jax.model import Llama
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.rope import compose

TINY = Path(__file__).parents[2] / "assets/tiny"

pytestmark = pytest.mark.usefixtures("one_thread")


def entropy(weights: np.ndarray) -> np.ndarray:
    """Returns -sum p ln p over the last axis in float64, with 0 ln 0 = 0."""
    weights = weights.astype(np.float64)
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(-1)


def exact(q: np.ndarray, k: np.ndarray, window: int | None) -> np.ndarray:
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    logits = np.einsum("btnh,bsnh->bnts", q.astype(np.float64), np.repeat(k.astype(np.float64), group, axis=2))
    seen = np.tri(length, dtype=bool)
    if window is not None:
        seen &= ~np.tri(length, k=-window, dtype=bool)
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return entropy(weights / weights.sum(-1, keepdims=True))


# Blocks that divide the length, that do not, a single one, and windows within a block and across several.
@pytest.mark.parametrize(
    ("length", "block", "window"), [(48, 16, None), (50, 16, None), (50, 64, None), (50, 8, 5), (50, 8, 8), (50, 8, 27)]
)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_blocks_give_the_dense_entropy(length: int, block: int, window: int | None, heads: tuple[int, int]) -> None:
    q, k, _ = random_qkv(length, *heads, 8)
    q *= np.array([0.1, 1, 20])[: heads[0], None].repeat(heads[0] // 2, 0)[: heads[0]]  # even, usual and sharp heads
    found = row_entropies(jnp.asarray(q), jnp.asarray(k), window, block)
    assert (found.shape, found.dtype) == ((2, heads[0], length), jnp.float32)
    # Entropies up to ln 50 = 3.9 from sums of float32 terms.
    np.testing.assert_allclose(found, exact(q, k, window), atol=5e-6)


def test_even_attention_has_the_logarithm_of_the_position() -> None:
    k = np.random.default_rng(0).normal(size=(1, 40, 1, 8)).astype(np.float32)
    found = row_entropies(jnp.zeros((1, 40, 2, 8)), jnp.asarray(k), block=16)
    np.testing.assert_allclose(found[0], np.log(np.arange(1, 41))[None].repeat(2, 0), atol=1e-6)
    many = Entropies([0, 4, 40], np.zeros((1, 1, 1, 2)))
    np.testing.assert_allclose(many.uniform, [np.log([1, 2, 3, 4]).mean(), np.log(np.arange(5, 41)).mean()])


def test_logits_far_from_zero_lose_no_accuracy_to_overflow() -> None:
    q, k, _ = random_qkv(40, 2, 1, 8)
    found = row_entropies(jnp.asarray(q * 100), jnp.asarray(k), block=16)
    # Logits of 1,000 have a float32 rounding of 6e-5.
    np.testing.assert_allclose(found, exact(q * 100, k, None), atol=5e-4)


@pytest.fixture(scope="module", params=["mistral", "ministral3", "smollm3", "granite", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, np.ndarray]:
    """A random model, and the float64 entropies of the attention weights of the same model in transformers.

    The architectures differ in what changes attention: windows, also by layer, a logit multiplier, layers without
    rotation, another scale, and norms of queries and keys.
    """
    other = in_transformers(request.param, **FULL[request.param])
    directory = tmp_path_factory.mktemp("model")
    other.save_pretrained(directory)
    with torch.no_grad():
        weights = other(torch.from_numpy(TOKENS), output_attentions=True).attentions
    return load(directory, dtype="float32")[0], np.stack([entropy(layer.numpy()) for layer in weights], axis=1)


def test_entropies_are_those_of_transformers(pair: tuple[Llama, np.ndarray]) -> None:
    model, expected = pair  # [rows, layers, heads, length]
    found = attention_entropy(model, TOKENS)
    assert (found.shape, found.dtype) == ((3, 4, 24), np.float32)
    np.testing.assert_allclose(found, expected.mean(0), atol=1e-4)  # as for the logits of the family
    assert not found[..., 0].any()


def test_every_mesh_and_batch_size_gives_the_same(pair: tuple[Llama, np.ndarray], tmp_path_factory: Any) -> None:
    from eabf_jax.parallel.rules import moved

    model, expected = pair
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    edges = [0, 1, 8, 21]
    wanted = np.stack([expected[..., a:b].mean(-1) for a, b in itertools.pairwise(edges)], axis=-1)
    for found in (entropies(moved(model, mesh), TOKENS, edges), entropies(model, TOKENS[:1], edges, batch_size=2)):
        np.testing.assert_allclose(found.means, wanted[: len(found.means)], atol=1e-4)


def test_every_backend_gives_the_same(pair: tuple[Llama, np.ndarray]) -> None:
    model, expected = pair
    for name in ("reference", "chunked"):
        other = Llama.from_params(model.config, model.parameters(), attention=name)
        np.testing.assert_allclose(attention_entropy(other, TOKENS), expected.mean(0), atol=1e-4)


def test_bfloat16_is_near() -> None:
    q, k, _ = random_qkv(64, 2, 1, 8)
    q, k = (np.asarray(x, jnp.bfloat16) for x in (q, k))
    np.testing.assert_allclose(row_entropies(jnp.asarray(q), jnp.asarray(k), block=16), exact(q, k, None), atol=5e-6)


def test_means_and_intervals_are_over_documents() -> None:
    means = np.arange(3 * 2 * 2 * 3, dtype=np.float64).reshape(3, 2, 2, 3) ** 1.5
    found = Entropies([0, 8, 16, 48], means)
    # Student's t for 2 degrees of freedom is 4.302653 (tables).
    error = 4.302653 * means.std(0, ddof=1) / np.sqrt(3)
    assert by_head(found)[1][0][2] == pytest.approx((means[:, 1, 0, 2].mean(), error[1, 0, 2]))
    assert by_layer(found)[0][1].mean == pytest.approx(means[:, 0, :, 1].mean())
    inside, beyond = means[..., 1].mean(2), means[..., 2].mean(2)  # of a window of 16: its last half, and the rest
    for layer, change in enumerate(drift(found, 16)):
        assert change.mean == pytest.approx((beyond - inside)[:, layer].mean())


@pytest.mark.parametrize(("edges", "window"), [([0, 8, 16], 16), ([0, 16, 32], 16), ([0, 12, 20], 16)])
def test_a_drift_needs_bands_on_both_sides_of_the_window(edges: list[int], window: int) -> None:
    with pytest.raises(InputError, match="no part within 8 to 16 tokens, the last half"):
        drift(Entropies(edges, np.zeros((1, 1, 1, len(edges) - 1))), window)


def test_bad_tokens_and_bands_are_refused(pair: tuple[Llama, np.ndarray]) -> None:
    model, _ = pair
    for tokens, edges, message in (
        (TOKENS, [0, 25], "ends at 25, the documents at 24"),
        (TOKENS, [4, 4], "do not increase"),
        (TOKENS[0], [0, 8], "integers of shape"),
        (TOKENS + SIZES["vocab_size"], [0, 8], "39 are possible"),
    ):
        with pytest.raises(InputError, match=message):
            entropies(model, tokens, edges)


def test_nan_is_refused(pair: tuple[Llama, np.ndarray]) -> None:
    model, _ = pair
    broken = model.with_parameters(jax.tree.map(lambda leaf: leaf * jnp.nan, model.parameters()))
    with pytest.raises(InputError, match="entropy is not finite"):
        entropies(broken, TOKENS, [0, 24])


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> np.ndarray:
    """Four documents of 256 tokens of real text that does not change: the licence."""
    tokens = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    return np.array(tokens[: 4 * 256]).reshape(4, 256)


def test_matched_slopes_keep_the_entropy_of_the_window(texts: np.ndarray) -> None:
    """The tiny model, counted as one with a window of 64 tokens."""
    frequencies = {"type": "abf", "base": 100_000.0}
    plain = load(TINY, rope=frequencies, dtype="float32")[0]
    done: list[int] = []
    found = matched(plain, texts, 64, done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    edges = [0, 8, 16, 32, 64, 128, 256]
    before = entropies(plain, texts, edges)
    # ln 4 lies between the middles of 8-16 and 32-64.
    inside = before.means.mean((0, 2))
    np.testing.assert_allclose(found.growth, (inside[:, 3] - inside[:, 1]) / math.log(4), atol=1e-4)
    multiplier = {"type": "layer_temperature", "pretrained_window": 64, "betas": found.betas.tolist()}
    after = entropies(load(TINY, rope=compose(frequencies, multiplier), dtype="float32")[0], texts, edges)
    change = {name: np.array([mean.mean for mean in drift(e, 64)]) for name, e in (("no", before), ("yes", after))}
    # Six steps of the search approximate a curve by lines, which costs a few percent of what the fit removes.
    fitted = (found.betas > 0) & (found.betas < 1.49 / math.log(64))
    assert fitted.sum() >= 2
    assert found.betas.max() <= 1.5 / math.log(64) + 1e-6
    assert np.all(np.abs(change["yes"])[fitted] < 0.03)
    assert np.abs(change["no"])[fitted].max() > 0.1
    # Where no multiplier is needed, none is fitted.
    assert np.all(change["yes"][found.betas == 0] <= 0.03)


def test_a_sliding_window_bounds_the_entropies_that_are_matched(texts: np.ndarray) -> None:
    model = load(TINY, dtype="float32")[0]
    windowed = dataclasses.replace(model.config, sliding_window=16, full_attention_layers=(1, 3, 5))
    found = matched(Llama.from_params(windowed, model.parameters()), texts, 64)
    # A layer that always sees 16 tokens neither grows from 16 on nor needs a multiplier.
    assert np.abs(found.growth[[0, 2, 4]]).max() < 0.2
    assert found.growth[[1, 3, 5]].max() > 0.2


def test_documents_within_the_window_cannot_be_matched(texts: np.ndarray) -> None:
    with pytest.raises(InputError, match="documents of 256 tokens end within the window of 256"):
        matched(load(TINY, dtype="float32")[0], texts, 256)
