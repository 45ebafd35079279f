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
    """torch's cross-entropy on transformers' logits."""
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        logits = in_transformers(yarn, params)(ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").numpy()


def losses(config, params, tokens, *, chunk, start=0, dtype=jnp.float32):
    model = Llama.abstract(config, attention="reference", dtype=dtype)
    return jax.jit(
        lambda params: token_losses(model.with_parameters(params), tokens, chunk=chunk, start=start),
    )(params)


@pytest.mark.parametrize(("chunk", "start"), [(1, 0), (3, 2), (8, 0), (1024, 0)])
def test_losses_are_torchs_whatever_the_chunk(yarn, params, tokens, expected, chunk, start):
    found = losses(yarn, params, tokens, chunk=chunk, start=start)
    assert found.dtype == jnp.float32
    # Two float32 forward passes; logits are of order ten, where a rounding is 1e-6.
    np.testing.assert_allclose(found, expected[:, start:], rtol=0, atol=2e-5)


def test_losses_are_float32_under_bfloat16(yarn, params, tokens, expected):
    found = losses(yarn, params, tokens, chunk=4, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    # bfloat16 keeps 8 bits: logits of order ten are off by some hundredths.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.5)
    assert np.abs(np.asarray(found) - expected).max() > 1e-4


def avals(jaxpr):
    """Every array of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from avals(inner)


@pytest.mark.parametrize(("chunk", "exist"), [(1, False), (4, False), (31, False), (63, True)])
def test_full_logits_exist_only_where_the_chunk_is_the_whole_row(yarn, params, chunk, exist):
    model = Llama.abstract(yarn, attention="reference")
    tokens = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32)

    def loss(params, tokens):
        return token_losses(model.with_parameters(params), tokens, chunk=chunk).sum()

    jaxpr = jax.make_jaxpr(jax.jit(jax.value_and_grad(loss)))(params, tokens)
    sizes = [aval.size for aval in avals(jaxpr.jaxpr) if yarn.vocab_size in getattr(aval, "shape", ())]
    assert max(sizes) >= ROWS * chunk * yarn.vocab_size  # the walk does see the logits of a chunk
    assert (max(sizes) >= ROWS * 63 * yarn.vocab_size) == exist


def test_targets_by_hand():
    tokens = np.array([[5, 6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6, 7]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    learned = np.array([[1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1]], bool)
    targets, mask = next_tokens(tokens, learned, segments)
    assert targets[mask].tolist() == [6, 9, 3, 4, 7]
    # Row 0: the first token of document 2 is learned by nobody, and padding never counts.
    assert mask.astype(int).tolist() == [[1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0]]
    assert (targets.dtype, mask.dtype) == (np.int32, bool)
