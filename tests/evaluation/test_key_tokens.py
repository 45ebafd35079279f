"""Key tokens and their losses against the paper's definition, and on texts where the key tokens are known."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats

from eabf_jax.errors import InputError
from eabf_jax.evaluation import perplexity
from eabf_jax.evaluation.key_tokens import (
    check_short_context,
    key_token_losses,
    key_token_means,
    key_tokens,
    student_of_some,
)
from eabf_jax.evaluation.perplexity import position_losses, sliding_losses
from eabf_jax.evaluation.scorer import Span

VOCABULARY = 1000
COPIED = 0.9


class Copier:
    """A scorer of a model that continues a pair of tokens as before, if it has seen the pair, and else guesses."""

    def __call__(self, spans: Sequence[Span], batch_size: int = 1) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for index, span in enumerate(spans):
            text = [*span.tokens[: span.begin + 1], *span.targets]
            log_probs = [self.log_prob(text, place) for place in range(span.begin + 1, len(text))]
            yield index, np.array(log_probs, np.float32), np.zeros(len(log_probs), bool)

    def log_prob(self, text: Sequence[int], place: int) -> float:
        pair = tuple(text[place - 2 : place])
        if len(pair) == 2:
            for before in range(2, place):
                if tuple(text[before - 2 : before]) == pair:
                    right = text[before] == text[place]
                    return float(np.log(COPIED if right else (1 - COPIED) / (VOCABULARY - 1)))
        return -float(np.log(VOCABULARY))


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(perplexity, "Scorer", lambda model: model)
    return Copier()


def readings(model: Any, documents: np.ndarray, context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    return position_losses(model, documents), sliding_losses(model, documents, context + stride, stride)


@pytest.mark.parametrize(("context", "stride"), [(20, 8), (40, 1), (52, 7)])
def test_only_a_copy_of_what_the_short_context_lacks_is_key(copier: Any, context: int, stride: int) -> None:
    """The second half repeats the first, 60 tokens before; two tokens of it must be seen to know where it goes on."""
    halves = np.stack([np.random.default_rng(seed).permutation(VOCABULARY)[:60] for seed in range(3)])
    documents = np.concatenate([halves, halves], axis=1).astype(np.int32)
    long, short = readings(copier, documents, context, stride)
    keys = key_tokens(long, short, context + stride)
    expected = np.zeros(119, bool)
    # Windows hold less than 60 + 2 tokens before any token, so only the whole document has the pair's first place.
    expected[62 - 1 :] = True
    np.testing.assert_array_equal(keys, np.tile(expected, (3, 1)))
    (part,) = key_token_losses(long, keys, [60, 120])
    assert (part.tokens, part.documents) == (3 * 58, 3)
    assert part.mean == pytest.approx(-np.log(COPIED), rel=1e-6)
    assert part.perplexity == pytest.approx(1 / COPIED, rel=1e-6)


def test_a_copy_within_the_short_context_is_not_key(copier: Any) -> None:
    period = np.random.default_rng(0).permutation(VOCABULARY)[:10]
    documents = np.tile(period, 12)[None].astype(np.int32)
    long, short = readings(copier, documents, 20, 8)
    assert (long[:, 12:] < 1).all()  # it does copy
    assert not key_tokens(long, short, 28).any()


def test_definition_in_float64() -> None:
    random = np.random.default_rng(3)
    long, short, losses = (random.gamma(2.0, 1.5, (7, 50)).astype(np.float32) for _ in range(3))
    window, edges = 12, [0, 10, 13, 30, 51]
    keys = key_tokens(long, short, window)
    found = key_token_losses(losses, keys, edges)
    assert [(part.start, part.end) for part in found] == [(0, 10), (10, 13), (13, 30), (30, 51), (0, 51)]
    assert found[0].tokens == found[0].documents == 0 and np.isnan(found[0].mean)
    assert 0 < found[1].documents < 7 and found[4].documents == 7
    for part in found[1:]:
        means = []
        for row in range(7):
            # log p with long context is at least 2 nats above that with short context, and above -2.
            chosen = [
                np.float64(losses[row, position - 1])
                for position in range(max(part.start, window), part.end)
                if np.float64(short[row, position - 1]) - np.float64(long[row, position - 1]) > 2
                and -np.float64(long[row, position - 1]) > -2
            ]
            if chosen:
                means.append(sum(chosen) / len(chosen))
        assert part.documents == len(means)
        assert part.mean == pytest.approx(np.mean(means), rel=1e-12)
        if len(means) > 1:
            interval = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
            assert part.mean - part.half_width == pytest.approx(interval.low, rel=1e-9)
            assert part.low == pytest.approx(np.exp(interval.low), rel=1e-9)
            assert part.high == pytest.approx(np.exp(interval.high), rel=1e-9)
    assert found[4].tokens == keys.sum()


def test_thresholds() -> None:
    long, short = np.array([[1.0, 1.0, 2.0, 1.99, 0.1]]), np.array([[3.0, 3.01, 9.0, 9.0, 2.0]])
    assert key_tokens(long, short, 1).tolist() == [[False, True, False, True, False]]
    assert key_tokens(long, short, 3).tolist() == [[False, False, False, True, False]]
    assert key_tokens(long, short, 1, alpha=1.5, beta=-1.5).tolist() == [[True, True, False, False, True]]


def test_documents_without_key_tokens_are_left_out() -> None:
    losses = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    keys = np.array([[False, True, True], [False, False, False]])
    (means,) = key_token_means(losses, keys, [0, 4]).values()
    assert means[0] == 2.5 and np.isnan(means[1])
    assert student_of_some(means).mean == 2.5
    assert np.isnan(student_of_some(np.array([np.nan])).mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_short_context(90, 10, 100), "windows of 100 tokens are not shorter than the documents' 100"),
        (lambda: key_token_means(np.zeros((1, 9)), np.zeros((1, 9), bool), [0, 11]), "band ends at 11"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    check_short_context(89, 10, 100)
    with pytest.raises(InputError, match=message):
        call()
