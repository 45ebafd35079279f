import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eabf_jax.model.llama import Llama
from eabf_jax.training.loss import next_tokens, token_losses

ROWS, LENGTH = 2, 9


@pytest.fixture(scope="module")
def tokens(yarn):
    return np.random.default_rng(0).integers(0, yarn.vocab_size, (ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def expected(yarn, params, tokens, in_transformers):
    """Computes torch's cross-entropy on transformers' logits."""
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        logits = in_transformers(yarn, params)(ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").numpy()


@pytest.mark.parametrize(("dtype", "off"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.5)])
def test_losses_are_torchs(yarn, params, tokens, expected, dtype, off):
    model = Llama.abstract(yarn, attention="reference", dtype=dtype)
    found = jax.jit(lambda params: token_losses(model.with_parameters(params), tokens))(params)
    assert found.dtype == jnp.float32
    # Logits are of order ten, where a rounding is 1e-6 in float32 and a few hundredths in bfloat16.
    np.testing.assert_allclose(found, expected, rtol=0, atol=off)
    assert (np.abs(np.asarray(found) - expected).max() > 1e-4) == (dtype == jnp.bfloat16)


def test_targets_by_hand():
    tokens = np.array([[5, 6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6, 7]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    learned = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1]], bool)
    targets, mask = next_tokens(tokens, learned, segments)
    assert targets[mask].tolist() == [6, 9, 3, 4, 7]
    # Row 0: the first token of document 2 is no target, and padding never counts.
    assert mask.astype(int).tolist() == [[1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0]]
    assert (targets.dtype, mask.dtype) == (np.int32, bool)
