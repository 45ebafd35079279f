"""The choice of a token, against transformers' own processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eabf_jax.errors import InputError
from eabf_jax.inference.sampling import Sampling, choose, processed, split

ROWS, VOCAB = 3, 50


def draw_logits() -> np.ndarray:
    return (3 * np.random.default_rng(0).normal(size=(ROWS, VOCAB))).astype(np.float32)


def seen_by(prompts: np.ndarray) -> jax.Array:
    seen = np.zeros((ROWS, VOCAB), np.bool_)
    np.put_along_axis(seen, prompts, True, axis=1)
    return jnp.asarray(seen)


def expected(sampling: Sampling, prompts: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Applies the processors that transformers' `generate` sets up for these settings, in its order."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    settings = transformers.GenerationConfig(
        do_sample=sampling.temperature > 0, temperature=sampling.temperature or 1.0, top_k=sampling.top_k,
        top_p=sampling.top_p, repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip
    processors = model._get_logits_processor(generation_config=settings, input_ids_seq_length=prompts.shape[1])
    assert isinstance(processors, LogitsProcessorList)
    return processors(torch.from_numpy(prompts), torch.from_numpy(logits)).numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=VOCAB + 7),
        Sampling(temperature=1.0, top_k=2**40),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=0.8, top_k=10, top_p=0.6, repetition_penalty=1.2),
        Sampling(temperature=3.0, top_k=30, top_p=0.8, repetition_penalty=0.7),
    ],
)
def test_logits_are_those_of_transformers(sampling: Sampling) -> None:
    prompts = np.random.default_rng(1).integers(0, VOCAB, (ROWS, 12))
    logits = draw_logits()
    steps, numbers = split(sampling)
    found = np.asarray(processed(jnp.asarray(logits), seen_by(prompts) if steps.penalize else None, steps, numbers))
    theirs = expected(sampling, prompts, logits)
    # The remaining tokens are exactly equal; float32 products and quotients round differently.
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(theirs))
    np.testing.assert_allclose(found, theirs, rtol=1e-6)


def test_the_processors_meant_are_those_set_up() -> None:
    """Transformers leaves out settings that it considers defaults, so the test above could compare nothing."""
    prompts, logits = np.zeros((ROWS, 1), np.int64), draw_logits()
    by_hand = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(10),
            TopPLogitsWarper(0.6),
        ]
    )(torch.from_numpy(prompts), torch.from_numpy(logits)).numpy()
    whole = Sampling(temperature=0.8, top_k=10, top_p=0.6, repetition_penalty=1.2)
    np.testing.assert_array_equal(expected(whole, prompts, logits), by_hand)


def test_draws_follow_the_probabilities() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    steps, numbers = split(Sampling(temperature=1.0, top_k=3))
    count = 20_000
    keys = jax.vmap(jax.random.key)(np.arange(count, dtype=np.uint32))
    tokens = choose(jnp.broadcast_to(logits, (count, 4)), None, keys, jnp.int32(0), steps, numbers)
    shares = np.bincount(np.asarray(tokens), minlength=4) / count
    # Three standard deviations of a share near a half are 0.0106.
    np.testing.assert_allclose(shares, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.011)
    assert shares[3] == 0


def test_a_draw_depends_on_the_rows_key_and_the_number_of_the_draw_alone() -> None:
    logits, (steps, numbers) = jnp.asarray(draw_logits()), split(Sampling(temperature=3.0))
    keys = jax.vmap(jax.random.key)(np.array([3, 4, 3], np.uint32))
    same = jnp.stack((logits[0], logits[1], logits[0]))
    draws = np.stack([choose(same, None, keys, jnp.int32(n), steps, numbers) for n in range(30)])
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    alone = np.stack([choose(same[1:2], None, keys[1:2], jnp.int32(n), steps, numbers) for n in range(30)])
    np.testing.assert_array_equal(draws[:, 1:2], alone)
    assert len(set(draws[:, 0].tolist())) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
