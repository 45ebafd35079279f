"""Confidence intervals: of a mean over documents, and of a share of hits."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean and its confidence interval, mean - half_width to mean + half_width."""

    mean: float
    half_width: float  # NaN for a single value


class Share(NamedTuple):
    """Hits out of a number of trials, and the confidence interval of their share."""

    hits: int
    total: int
    low: float  # NaN for a single cluster, as is `high`
    high: float


def student(values: Float[np.ndarray, "documents"]) -> Mean:
    """Computes the mean of independent values, one per document, with Student's t interval.

    Returns:
      The mean and half the width of its 95 % confidence interval: t for n - 1 degrees of freedom x the standard error.
    """
    values, count = np.asarray(values, np.float64), len(values)
    if count < 2:
        return Mean(float(values.mean()), math.nan)
    t = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return Mean(float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(count)))


def clustered(clusters: Sequence[tuple[int, int]]) -> Share:
    """Computes a share of hits, with a bootstrap interval over clusters of trials that tend to have the same outcome.

    Each resample draws as many clusters as there are, with replacement, and one trial from each, so a cluster counts
    once however many trials it has. Two clusters are added to the draw, one all hits and one all misses; without them,
    clusters with the same outcome would give an interval of zero width. The hits of such resamples are binomial, so
    their percentiles are known without drawing.

    Args:
      clusters: hits and trials of each; all have the same number of trials.

    Returns:
      The share with its 95 % confidence interval.
    Source: two-stage bootstrap of hierarchical data (Davison and Hinkley, "Bootstrap Methods and their Application",
    1997, section 3.8); the two clusters are Laplace's rule of succession.
    """
    hits, total, count = sum(part[0] for part in clusters), sum(part[1] for part in clusters), len(clusters)
    if count < 2:
        return Share(hits, total, math.nan, math.nan)
    chance = (count * hits / total + 1) / (count + 2)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.searchsorted(special.bdtr(np.arange(count + 1), count, chance), (tail, 1 - tail)) / count
    return Share(hits, total, float(low), float(high))


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replaces NaN and infinity by None, because JSON has neither."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
