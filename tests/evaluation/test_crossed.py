"""Intervals and tests for seeds x documents: against Student's, against simulated tables, and Holm by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from eabf_jax.evaluation.crossed import Estimate, crossed, holm, needed


def tables(count: int, seeds: int, documents: int, spread: tuple[float, float, float]) -> np.ndarray:
    """Draws tables [count, seeds, documents] with mean 0 and these deviations of seeds, documents and the rest."""
    random = np.random.default_rng([seeds, documents])
    shapes = ((count, seeds, 1), (count, 1, documents), (count, seeds, documents))
    return sum(deviation * random.normal(size=shape) for deviation, shape in zip(spread, shapes, strict=True))


def test_a_single_seed_is_students_test_of_the_documents() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, (1, 12))
    found, expected = crossed(values), stats.ttest_1samp(values[0], 0.0)
    low, high = expected.confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_documents_without_seed_effects_count_once_however_many_seeds_repeat_them() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, (1, 12))
    one, many = crossed(values), crossed(np.repeat(values, 5, axis=0))
    assert many.half_width == pytest.approx(one.half_width) and many.p == pytest.approx(one.p)


def test_seeds_without_document_effects_count_once_however_many_documents_repeat_them() -> None:
    values = np.random.default_rng(2).normal(0.3, 1.0, (5, 1))
    found, expected = crossed(np.repeat(values, 30, axis=1)), stats.ttest_1samp(values[:, 0], 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.half_width == pytest.approx((high - low) / 2) and found.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(("seeds", "documents"), [(2, 8), (3, 5), (3, 24), (5, 24)])
@pytest.mark.parametrize("spread", [(0, 1, 0), (1, 1, 1), (1, 0, 1), (0.3, 1, 0.3), (0.5, 1, 0.2), (0, 0, 1)])
def test_intervals_cover_the_mean_of_simulated_tables(
    seeds: int, documents: int, spread: tuple[float, float, float]
) -> None:
    """About 95 % or more of the intervals contain the true mean, 0; those of values taken as independent do not."""
    drawn = tables(1500, seeds, documents, spread)
    found = [crossed(values) for values in drawn]
    # Three standard deviations of a share of 0.95 among 1,500.
    assert np.mean([abs(estimate.mean) <= estimate.half_width for estimate in found]) >= 0.95 - 0.017
    if spread == (1, 1, 1):
        flat = drawn.reshape(len(drawn), -1)
        independent = stats.ttest_1samp(flat, 0.0, axis=1).confidence_interval()
        assert np.mean((independent.low <= 0) & (independent.high >= 0)) < 0.75


def test_p_values_of_simulated_tables_are_not_below_their_level_too_often() -> None:
    found = np.array([crossed(values).p for values in tables(1500, 3, 24, (1, 1, 1))])
    assert all(np.mean(found < level) <= level + 3 * math.sqrt(level * (1 - level) / 1500) for level in (0.01, 0.05))


def test_p_and_interval_agree() -> None:
    for values in tables(50, 3, 8, (0.2, 1, 0.5)) + 0.6:
        found = crossed(values)
        assert (found.p < 0.05) == (found.half_width < abs(found.mean))
        assert found.reach(found.p) == pytest.approx(abs(found.mean), rel=1e-6)


def test_equal_shares_have_an_interval_of_some_width() -> None:
    found = crossed(np.ones((3, 5)), (0.0, 1.0))
    # Six of seven documents at 1 and one at 0: variance 1/7, over 7 documents; t for 6 degrees of freedom.
    assert (found.mean, found.half_width) == pytest.approx((1.0, 2.447 / 7), rel=5e-4)
    assert crossed(np.zeros((3, 5)), (-1.0, 1.0)).p == 1


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_intervals_cover_the_share_of_documents_that_are_all_hit_or_all_missed(share: float) -> None:
    random = np.random.default_rng(0)
    drawn = np.repeat((random.random((1500, 1, 5)) < share).astype(float), 3, axis=1)
    covered = [abs(found.mean - share) <= found.half_width for found in (crossed(v, (0.0, 1.0)) for v in drawn)]
    assert np.mean(covered) >= 0.93  # five documents have few possible shares


def test_one_document_has_no_interval() -> None:
    found = crossed(np.ones((3, 1)))
    assert found.mean == 1 and math.isnan(found.half_width) and math.isnan(found.p)


def test_holm_by_hand() -> None:
    """Of five, the least counts five times, the next four times and so on; none falls below the one before."""
    assert holm([0.05, 0.01, 0.03, 0.02, 0.04]) == pytest.approx([0.09, 0.05, 0.09, 0.08, 0.09])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    found = holm([0.02, math.nan, 0.01])
    assert found[0] == found[2] == pytest.approx(0.02) and math.isnan(found[1])


def test_the_number_of_documents_needed_is_the_first_that_would_do() -> None:
    found = Estimate(0.1, 3, 10, 0.0001, 0.01, 9)
    documents, seeds = needed(found, 0.05)
    assert documents is not None and documents > 10

    def p(count: int) -> float:
        return found._replace(units=count, unit_variance=0.01 * 10 / count, freedom=count - 1).p

    assert p(documents) < 0.05 <= p(documents - 1)
    assert seeds is None  # the documents alone leave more than 0.1
    assert needed(found._replace(mean=1e-6), 0.05) == (None, None)
