"""Means and tests for values of several seeds on the same documents, and the correction for several tests.

Every seed's model reads the same documents, so the values form a table of seeds x documents. A value is the sum of the
mean, an effect of its seed, an effect of its document and a rest. Neither the documents of one seed nor the seeds of
one document are independent observations of the mean. If all values counted as independent, more seeds would narrow
the interval even where only documents differ, and more documents even where only seeds do.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from eabf_jax.evaluation.intervals import CONFIDENCE

# `needed` looks no further than this multiple of the documents or seeds at hand.
_MOST = 1000


class Estimate(NamedTuple):
    """A mean over seeds and units (documents or prompts), and what its uncertainty is made of."""

    mean: float
    seeds: int
    units: int
    seed_variance: float  # of the mean, as far as seeds show it; 0 for a single seed
    unit_variance: float  # of the mean, as far as units show it; NaN for a single unit
    freedom: int  # degrees of freedom of `unit_variance`

    @property
    def half_width(self) -> float:
        """Half of the 95 % confidence interval; NaN for a single unit."""
        return self.reach(1 - CONFIDENCE)

    @property
    def p(self) -> float:
        """Probability, if the true mean is 0, of one at least this far from 0; NaN for a single unit."""
        if math.isnan(self.unit_variance):
            return math.nan
        if self.mean == 0:
            return 1.0
        if self.reach(_LEAST) <= abs(self.mean):
            return _LEAST
        return float(optimize.brentq(lambda level: self.reach(level) - abs(self.mean), _LEAST, 1.0))

    def reach(self, level: float) -> float:
        """Returns half of the confidence interval of confidence 1 - `level`."""
        return math.sqrt(
            _quantile(level, self.freedom) ** 2 * self.unit_variance
            + (_quantile(level, self.seeds - 1) ** 2 * self.seed_variance if self.seeds > 1 else 0.0)
        )


_LEAST = 1e-12


def _quantile(level: float, freedom: int) -> float:
    return float(special.stdtrit(freedom, 1 - level / 2))


def crossed(values: Float[np.ndarray, "seeds documents"], bounds: tuple[float, float] | None = None) -> Estimate:
    """Computes a mean with an interval for new seeds on new documents.

    Half the interval's width is √(t_d² v_d + t_s² v_s). v_d is the variance of the documents' means over seeds, divided
    by their number; v_s is that of the seeds' means over documents; each t is Student's for its own degrees of freedom.
    v_d + v_s counts the rest twice, and weighting each variance with its own t covers at least 95 % for any ratio of
    the two. Satterthwaite's single t for their sum is narrower, but covers only 93 % with three seeds, and 88 % with
    two. A single seed leaves v_s out: the interval then holds for that seed alone.

    Args:
      values: [seeds, documents]; differences of two methods for a paired test.
      bounds: least and greatest possible value, for shares of hits. The interval then takes two more documents into
        account, one at each bound, so that documents with the same value do not give an interval of zero width.

    Source: Banerjee, "Approximate confidence interval for linear functions of means of k populations when the
    population variances are not equal", Sankhyā 22 (1960); the two further documents: see `intervals.clustered`.
    """
    values = np.asarray(values, np.float64)
    seeds, units = values.shape
    by_unit = values.mean(axis=0)
    if bounds is not None and units > 1:
        by_unit = np.append(by_unit, bounds)
    return Estimate(
        float(values.mean()),
        seeds,
        units,
        float(values.mean(axis=1).var(ddof=1) / seeds) if seeds > 1 else 0.0,
        float(by_unit.var(ddof=1) / len(by_unit)) if units > 1 else math.nan,
        max(len(by_unit) - 1, 1),
    )


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests, so that the chance of any false finding among them stays at their level.

    Args:
      probabilities: in any order; NaN stays NaN and counts as no test.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted((p, index) for index, p in enumerate(probabilities) if not math.isnan(p))
    adjusted, least = list(probabilities), 0.0
    for rank, (p, index) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        adjusted[index] = least
    return adjusted


def needed(estimate: Estimate, level: float) -> tuple[int | None, int | None]:
    """Estimates how many documents, or how many seeds, would show that a mean of this size is not 0.

    Args:
      level: of the test.

    Returns:
      Documents, with as many seeds as now; and seeds, with as many documents as now. None where no number up to a
      thousand times the present one is enough.
    """

    def enough(documents: int, seeds: int) -> bool:
        unit_variance = estimate.unit_variance * estimate.units / documents
        seed_variance = estimate.seed_variance * estimate.seeds / seeds
        freedom = estimate.freedom + documents - estimate.units
        changed = estimate._replace(
            seeds=seeds, units=documents, unit_variance=unit_variance, seed_variance=seed_variance, freedom=freedom
        )
        return changed.reach(level) < abs(estimate.mean)

    by_documents = _first(lambda n: enough(n, estimate.seeds), estimate.units)
    return by_documents, _first(lambda n: enough(estimate.units, n), estimate.seeds) if estimate.seeds > 1 else None


def _first(enough: Callable[[int], bool], start: int) -> int | None:
    """Returns the first number from `start` on that is enough, which larger ones then are too."""
    low, high = start - 1, start
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST * start:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
