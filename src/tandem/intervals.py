"""Numbers with their intervals, as results.json and judge_summary.json hold them. Arithmetic only.

An estimate is a dict of `value`, `low`, `high` (95% interval) and `n`. A value or interval that cannot be computed is
None, and `why` says the reason.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]  # typed loosely: counts, scores and flags are told apart by the docstrings
Estimate = dict[str, Any]

LEVEL = 0.95
RESAMPLES = 9_999
TERCILES = ("rejected_longer", "similar", "chosen_longer")


def estimate(value: float | None, low: float | None, high: float | None, n: int, why: str | None = None) -> Estimate:
    """An estimate; `why` says why a value or an interval is missing."""
    result: Estimate = {
        "value": None if value is None else float(value),
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
        "n": int(n),
    }
    return result if why is None else result | {"why": why}


def wilson(successes: float, n: int, why_none: str) -> Estimate:
    """A share with its Wilson score interval. `successes` need not be whole: a tie counts as half a success."""
    if n == 0:
        return estimate(None, None, None, 0, why_none)
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, n, alpha=1 - LEVEL, method="wilson")
    return estimate(successes / n, max(0.0, low), min(1.0, high), n)


def bootstrap(statistic: Callable[..., Any], samples: Sequence[Array], seed: int) -> Estimate:
    """`statistic` of paired `samples`, (n,) each, with its BCa bootstrap interval (Efron 1987).

    Samples whose values are all equal get no interval: resampling them says nothing. Where BCa is undefined, as for
    some nearly constant samples, the interval is the percentile interval.

    Args:
        statistic: takes the samples and `axis`, along which it reduces
        samples: of n ≥ 1 units each; unit i of all samples is resampled together
        seed: of the resampling
    """
    from scipy import stats

    value, n = float(statistic(*samples, axis=-1)), len(samples[0])
    if all(np.ptp(sample) == 0 for sample in samples):
        why = "there is only one" if n == 1 else "all of them have the same value"
        return estimate(value, None, None, n, f"{why}: nothing to resample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # BCa on nearly constant samples, which is dealt with below
        result = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(seed),
            batch=max(1, 2_000_000 // n),  # resamples at a time: bounds the memory, not the result's quality
        )
    low, high = result.confidence_interval
    if not np.isfinite([low, high]).all():
        low, high = np.quantile(result.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return estimate(value, low, high, n)


def mean(values: Array, axis: int) -> Any:
    """The mean, as `bootstrap` takes it."""
    return values.mean(axis)


def length_terciles(difference: Array) -> dict[str, Array]:
    """Indices of three equally large parts by `difference`, the length of chosen minus that of rejected, (n,).

    Equal differences keep their order.
    """
    order = np.argsort(difference, kind="stable")
    return dict(zip(TERCILES, np.array_split(order, len(TERCILES)), strict=True))
