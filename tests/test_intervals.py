"""Intervals: against their definitions, at their ends, and by how often they hold the truth."""

import numpy as np
import pytest

from tandem.intervals import bootstrap, length_terciles, mean


def median(values, axis):
    return np.median(values, axis)


def ratio(sums, counts, axis):
    return sums.sum(axis) / counts.sum(axis)


def test_bootstrap_of_one_unit_and_of_equal_units():
    for values, why in (([3.0], "there is only one"), ([3.0] * 5, "all of them have the same value")):
        found = bootstrap(mean, [np.array(values)], 0)
        assert (found["value"], found["low"], found["high"], found["n"]) == (3.0, None, None, len(values))
        assert found["why"].startswith(why)


def test_bootstrap_of_a_ratio_that_is_always_the_same():
    """Every resample gives 2: BCa divides by zero, the percentile interval has no width."""
    counts = np.array([1.0, 2.0, 3.0, 7.0])
    found = bootstrap(ratio, [2 * counts, counts], 0)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0, 9.0], [0.0, 0.0, 0.0, 1e-300], [1.0, 2.0]])
def test_bootstrap_of_nearly_constant_values_is_finite(values):
    for statistic in (mean, median):
        found = bootstrap(statistic, [np.array(values)], 0)
        assert min(values) <= found["low"] <= found["high"] <= max(values)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    """Of 200 samples of 40 exponential values with mean 1, about 95% of the intervals hold 1 (skew costs a little)."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = bootstrap(mean, [rng.exponential(size=40)], seed)
        covered += found["low"] <= 1 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(mean, [values], 1) == bootstrap(mean, [values], 1)
    assert bootstrap(mean, [values], 1) != bootstrap(mean, [values], 2)


def test_terciles_share_the_units_out_by_length():
    parts = length_terciles(np.array([5, -3, 0, 0, 9, -8, 1]))
    assert {name: sorted(rows.tolist()) for name, rows in parts.items()} == {
        "rejected_longer": [1, 2, 5],
        "similar": [3, 6],
        "chosen_longer": [0, 4],
    }
