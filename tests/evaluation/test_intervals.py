"""Intervals against printed tables, and against resampling as the definition describes it."""

import itertools
import math

import numpy as np
import pytest

from eabf_jax.evaluation.intervals import clustered, student

# Two-sided 95 % points of Student's t by degrees of freedom, from the usual printed table.
TABLE = {1: 12.706, 2: 4.303, 6: 2.447, 31: 2.040, 120: 1.980}


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_mean_with_students_t_from_the_printed_table(freedom: int, t: float) -> None:
    values = np.random.default_rng(freedom).normal(3.0, 2.0, freedom + 1)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / freedom
    found = student(values)
    assert found.mean == pytest.approx(mean, rel=1e-12)  # float64
    # The table has three decimals.
    assert found.half_width == pytest.approx(t * math.sqrt(variance / len(values)), rel=5e-4)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(student(np.array([2.0])).half_width)


def test_resamples_of_clusters_drawn_by_hand() -> None:
    """A resample has as many clusters, one trial of each, from those found, one all hits and one all misses."""
    clusters = [(10, 10), (10, 10), (5, 10), (8, 10), (0, 10), (10, 10)]
    random = np.random.default_rng(0)
    chances = np.array([hits / trials for hits, trials in clusters] + [1.0, 0.0])
    drawn = random.choice(chances, (200_000, 6))
    shares = (random.random(drawn.shape) < drawn).mean(axis=1)
    found = clustered(clusters)
    assert (found.hits, found.total) == (43, 60)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))


@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("kind", ["all or nothing", "graded", "alike"])
def test_intervals_cover_the_share_of_clustered_trials(count: int, kind: str) -> None:
    """With ten trials per cluster of known chances, about 95 % of intervals or more contain the true share.

    Intervals that count each trial as a separate cluster contain it less often.
    """
    random = np.random.default_rng(count)
    share = 0.8
    chances = {
        "all or nothing": random.random((1000, count)) < share,
        "graded": random.beta(0.4, 0.1, (1000, count)),
        "alike": np.full((1000, count), share),
    }[kind]
    hits = random.binomial(10, chances)
    found = [clustered([(int(h), 10) for h in row]) for row in hits]
    covered = np.mean([interval.low <= share + 1e-9 and share - 1e-9 <= interval.high for interval in found])
    assert covered >= 0.93  # few clusters have few possible shares, so coverage is not exactly 0.95
    if kind == "all or nothing":
        naive = [clustered([(1, 1)] * int(n) + [(0, 1)] * int(10 * count - n)) for n in hits.sum(axis=1)]
        assert np.mean([interval.low <= share <= interval.high for interval in naive]) < 0.7


def test_more_hits_never_move_an_interval_down_and_none_is_without_width() -> None:
    found = [
        clustered([(10, 10)] * full + [(part, 10)] + [(0, 10)] * (4 - full)) for full in range(5) for part in range(11)
    ]
    for before, after in itertools.pairwise(found):
        assert before.low <= after.low and before.high <= after.high
    assert all(interval.low < interval.high for interval in found)
    assert (found[0].low, found[-1].high) == (0.0, 1.0)


def test_a_single_cluster_has_no_interval() -> None:
    found = clustered([(9, 10)])
    assert (found.hits, found.total) == (9, 10)
    assert math.isnan(found.low) and math.isnan(found.high)
