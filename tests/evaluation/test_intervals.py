"""Intervals against printed tables and against the definition that a formula solves."""

import math

import numpy as np
import pytest

from eabf_jax.evaluation.intervals import student, wilson

# Two-sided 95 % points of Student's t by degrees of freedom, from the usual printed table.
TABLE = {1: 12.706, 2: 4.303, 6: 2.447, 31: 2.040, 120: 1.980}


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_mean_with_students_t_from_the_printed_table(freedom: int, t: float) -> None:
    values = np.random.default_rng(freedom).normal(3.0, 2.0, freedom + 1)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / freedom
    found = student(values)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    # The table has three decimals.
    assert found.half_width == pytest.approx(t * math.sqrt(variance / len(values)), rel=5e-4)


def test_one_value_has_no_interval() -> None:
    assert math.isnan(student(np.array([2.0])).half_width)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (1, 1), (3, 20), (97, 100), (250, 1000)])
def test_wilsons_ends_are_the_shares_at_196_standard_errors(hits: int, total: int) -> None:
    """By bisection: the interval holds every share p from which hits / total is no further than z standard errors."""

    def beyond(p: float) -> float:
        return abs(hits / total - p) - 1.959964 * math.sqrt(p * (1 - p) / total)

    def root(outside: float, inside: float) -> float:
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if beyond(middle) > 0 else (outside, middle)
        return (outside + inside) / 2

    found = wilson(hits, total)
    share = hits / total
    assert (found.hits, found.total) == (hits, total)
    assert found.low == pytest.approx(0.0 if hits == 0 else root(0.0, share), abs=1e-6)
    assert found.high == pytest.approx(1.0 if hits == total else root(1.0, share), abs=1e-6)
