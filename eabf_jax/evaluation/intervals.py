"""Confidence intervals: of a mean over documents, and of a share of hits."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean and its confidence interval, mean - half_width to mean + half_width."""

    mean: float
    half_width: float  # NaN of a single value


class Share(NamedTuple):
    """Hits of a number of trials, and the confidence interval of their share."""

    hits: int
    total: int
    low: float
    high: float


def student(values: Float[np.ndarray, "documents"]) -> Mean:
    """The mean of independent values with Student's t interval.

    Args:
      values: one a document.

    Returns:
      The mean and half the width of its 95 % confidence interval: t of n - 1 degrees of freedom x the standard error.
    """
    values, count = np.asarray(values, np.float64), len(values)
    if count < 2:
        return Mean(float(values.mean()), math.nan)
    t = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return Mean(float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(count)))


def wilson(hits: int, total: int) -> Share:
    """A share of hits with Wilson's score interval, which holds near 0 and 1 and for few trials.

    Args:
      hits: how many succeeded.
      total: of how many, at least 1.

    Returns:
      The share with its 95 % confidence interval.
    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    z2 = special.ndtri((1 + CONFIDENCE) / 2) ** 2
    share, scale = hits / total, 1 + z2 / total
    centre = (share + z2 / (2 * total)) / scale
    half_width = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / scale
    # Rounding would leave 1e-17 where the interval ends at 0.
    low = 0.0 if hits == 0 else float(centre - half_width)
    high = 1.0 if hits == total else float(centre + half_width)
    return Share(hits, total, low, high)
