"""Loss by position against transformers' logits and NumPy averages."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from eabf_jax.errors import InputError
from eabf_jax.evaluation.perplexity import band_losses, position_losses, sliding_losses, window_ends, window_perplexity
from eabf_jax.model import Llama


def drawn(model: Llama, *shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, model.config.vocab_size, shape).astype(np.int32)


def test_losses_are_those_of_transformers_for_every_document_and_position(
    model: Llama, reference: LlamaForCausalLM
) -> None:
    documents = drawn(model, 19, 23)
    done: list[int] = []
    ours = position_losses(model, documents, batch_size=2, progress=done.append)
    with torch.no_grad():
        tokens = torch.tensor(documents, dtype=torch.long)
        logits = reference(tokens).logits
        theirs = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    # Both sides are float32 with logits of order 10; processors round sums differently, up to 2.5e-5 in all so far.
    np.testing.assert_allclose(ours, theirs.numpy(), atol=5e-5)
    assert ours.shape == (19, 22)
    assert done == list(range(1, 20))


@pytest.mark.parametrize(("length", "stride"), [(24, 4), (23, 4), (12, 4)])
def test_sliding_losses_are_those_of_transformers_window_by_window(
    model: Llama, reference: LlamaForCausalLM, length: int, stride: int
) -> None:
    window = 12
    documents = drawn(model, 3, length)
    done: list[int] = []
    ours = sliding_losses(model, documents, window, stride, batch_size=2, progress=done.append)
    theirs = np.full((3, length), np.nan)
    end = scored = 0
    while end < length:
        end = window if end == 0 else min(end + stride, length)
        tokens = torch.tensor(documents[:, end - window : end], dtype=torch.long)
        with torch.no_grad():
            logits = reference(tokens).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        new = end - max(scored, 1)
        theirs[:, end - new : end] = losses.numpy()[:, window - 1 - new :]
        scored = end
    # As above: both sides are float32 with logits of order 10.
    np.testing.assert_allclose(ours, theirs[:, 1:], atol=5e-5)
    # Every window is read once.
    assert done[-1] == 3 * len(window_ends(length, window, stride)) == 3 * (1 + -(-(length - window) // stride))


def test_perplexity_is_that_of_all_scored_tokens() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=(5, 31)).astype(np.float32)
    found = window_perplexity(losses, 16, 4)
    assert found.perplexity == pytest.approx(np.prod(np.exp(losses.astype(np.float64) / losses.size)), rel=1e-6)
    means = losses.astype(np.float64).mean(axis=1)
    half_width = 2.776445 * means.std(ddof=1) / np.sqrt(5)  # Student's t of 4 degrees of freedom at 97.5 %
    assert found.low == pytest.approx(found.perplexity / np.exp(half_width), rel=1e-6)
    assert found.high == pytest.approx(found.perplexity * np.exp(half_width), rel=1e-6)


@pytest.mark.parametrize(
    ("window", "stride", "complaint"),
    [(1, 1, "window 1"), (24, 4, "window 24"), (8, 8, "stride 8"), (8, 0, "stride 0")],
)
def test_windows_that_do_not_fit_are_refused(model: Llama, window: int, stride: int, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        sliding_losses(model, drawn(model, 1, 23), window, stride)


def test_bands_are_means_over_documents_of_the_positions_inside() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=(7, 63)).astype(np.float32)
    first, second = band_losses(losses, [0, 16, 64])
    # The loss of the token at position p is in column p - 1; position 0 has none.
    expected = losses[:, 0:15].astype(np.float64).mean(axis=1)
    assert (first.start, first.end) == (0, 16)
    assert first.mean == pytest.approx(expected.mean(), rel=1e-12)
    # 2.446912 is Student's t of 6 degrees of freedom at 97.5 %, rounded by at most 2e-7 relative; the rest is float64.
    assert first.half_width == pytest.approx(2.446912 * expected.std(ddof=1) / np.sqrt(7), rel=1e-6)
    assert second.mean == pytest.approx(losses[:, 15:63].astype(np.float64).mean(), rel=1e-12)


def test_one_document_has_no_confidence_interval() -> None:
    (band,) = band_losses(np.ones((1, 7), np.float32), [0, 8])
    assert np.isnan(band.half_width)


@pytest.mark.parametrize("edges", [[0], [0, 8, 8], [8, 0], [-1, 8], [0, 65]])
def test_bands_that_do_not_fit_are_refused(edges: list[int]) -> None:
    with pytest.raises(InputError, match="position band"):
        band_losses(np.ones((2, 63), np.float32), edges)
