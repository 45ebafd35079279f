"""Log-probabilities and likeliest tokens against transformers' logits, row by row and without padding."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaForCausalLM

from eabf_jax.errors import InputError
from eabf_jax.evaluation.scorer import Scorer, Span, padded_length, token_scores
from eabf_jax.model import Llama
from eabf_jax.model.llama import unconstrained
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import moved


@pytest.mark.parametrize(("mesh", "longest"), [(None, 32), (MeshConfig(fsdp=2, tensor=2), 16)], ids=str)
def test_spans_of_all_lengths_are_scored_as_in_transformers(
    model: Llama, reference: LlamaForCausalLM, mesh: MeshConfig | None, longest: int
) -> None:
    random = np.random.default_rng(0)
    spans, expected = [], []
    for length in random.integers(1, longest + 1, 41):
        tokens = random.integers(0, 62, length)
        begin = int(random.integers(length))
        with torch.no_grad():
            logits = reference(torch.tensor(tokens)[None]).logits[0, begin : random.integers(begin, length) + 1]
        log_probs = logits.log_softmax(-1).numpy()
        targets = np.where(random.random(len(logits)) < 0.5, logits.argmax(-1), random.integers(0, 62, len(logits)))
        spans.append(Span(tokens.tolist(), begin, targets.tolist()))
        expected.append((log_probs[np.arange(len(targets)), targets], log_probs.argmax(-1) == targets))
    scorer = Scorer(model if mesh is None else moved(model, make_mesh(mesh, jax.devices()[:4])))
    run, shapes = scorer._program, set()
    scorer._program = lambda params, *rows: shapes.add(tuple(x.shape for x in rows)) or run(params, *rows)
    found = {index: scores for index, *scores in scorer(spans, batch_size=2)}
    assert sorted(found) == list(range(41))
    for index, (log_probs, is_greedy) in enumerate(expected):
        # Both sides are float32 with logits of order 10, so rounding is a few 1e-6.
        np.testing.assert_allclose(found[index][0], log_probs, atol=5e-5)
        np.testing.assert_array_equal(found[index][1], is_greedy)
    assert sorted(shape[0][1] for shape in shapes) == list(range(16, longest + 1, 16))
    assert list(scorer([])) == []


@pytest.mark.parametrize("chunk", [1, 5, 7, 18, 19, 1024])
def test_chunks_change_nothing_but_the_logits_that_exist(chunk: int) -> None:
    random, rows, scored = np.random.default_rng(1), 2, 19
    hidden, kernel = (random.normal(size=size).astype(np.float32) for size in ((rows, 24, 8), (8, 62)))
    fixed: Any = SimpleNamespace(
        hidden_states=lambda *_: jnp.asarray(hidden), output_kernel=lambda: jnp.asarray(kernel), constrain=unconstrained
    )
    tokens, targets = (random.integers(0, 62, (rows, size)).astype(np.int32) for size in (24, scored))
    begins = np.array([0, 4], np.int32)
    arrays = (tokens, np.full(rows, 24, np.int32), begins, targets)
    run = functools.partial(token_scores, fixed, chunk=chunk)
    traced = str(jax.make_jaxpr(run)(*arrays))
    sizes = {int(size) for size in re.findall(rf"f32\[{rows},(\d+),62\]", traced)}
    assert sizes and max(sizes) <= chunk
    scores = np.stack([x[begin : begin + scored] for x, begin in zip(hidden, begins, strict=True)]) @ kernel
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    log_probs, is_greedy = jax.jit(run)(*arrays)
    expected = np.log(np.take_along_axis(probabilities, targets[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)  # float32 sums of 8 and 62 terms, of order 10
    np.testing.assert_array_equal(is_greedy, scores.argmax(-1) == targets)


def test_padded_lengths_are_few_and_close() -> None:
    lengths = np.arange(1, 40_000)
    padded = np.array([padded_length(int(length)) for length in lengths])
    assert (padded >= lengths).all() and (padded - lengths < np.maximum(16, lengths / 4)).all()
    for power in (64, 1024, 16384):
        assert len(set(padded[(lengths > power) & (lengths <= 2 * power)])) == 4


def test_models_of_one_shape_share_their_programs(model: Llama) -> None:
    other = Llama(model.config, rngs=nnx.Rngs(2), attention="reference")
    assert Scorer(other)._program is Scorer(model)._program


def test_a_mesh_that_splits_rows_is_refused(model: Llama) -> None:
    with pytest.raises(InputError, match="context=2"):
        Scorer(moved(model, make_mesh(MeshConfig(context=2))))
