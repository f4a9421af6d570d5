"""Strengths from pairwise verdicts, with intervals: of models over many prompts, and of several answers to one prompt.

The model of Bradley and Terry (1952): the probability that i beats j is expit(θ_i − θ_j); a tie counts as half a win.

`fit` is for models: a binomial GLM with errors clustered by prompt, since verdicts on one prompt are not independent.
`strengths` is for answers that were compared only a few times: where one won or lost every comparison, the likelihood
has no maximum. A normal prior, θ_i ~ N(0, PRIOR²), gives the posterior one (Davidson and Solomon 1973).
"""

import warnings
from collections.abc import Sequence

import numpy as np

from tandem.intervals import LEVEL, Array, Estimate, estimate
from tandem.judge.statistics import MIN_PROMPTS, separated

PRIOR = 1.5  # standard deviation of strengths in nats: on average the better of two answers wins 8 times out of 10
NO_BOUND = "some model won or lost all of its comparisons: its strength has no bound"
_STEPS = 50
_TOLERANCE = 1e-10
_DRAWS = 4000
_FREEDOM = 5  # degrees of freedom of the proposal, a t distribution: its tails are wider than the posterior's


def fit(
    first: Array, second: Array, scores: Array, units: Array, names: Sequence[str], covariate: Array | None = None
) -> dict[str, Estimate]:
    """The strength of each of `names` in log-odds. Strengths sum to zero: each is relative to the average model.

    There are no values where some models cannot be compared even by way of others, or where one model, or a group of
    them, won or lost every comparison with the rest: each estimate then says why. `ranks` are the best and the worst
    rank that the 95% intervals of the differences allow, not corrected for multiple comparisons.

    Args:
        first: int (m,) index into `names` of one side of each comparison
        second: int (m,) index of the other side
        scores: (m,) in [0, 1], the score of the first side: win 1, tie ½, loss 0, or a mean of these
        units: (m,) a number for the prompt of each comparison
        covariate: (m,) what else may explain a score, as the difference in length; 0 where it favours neither side

    Raises:
        ValueError: fewer than two names, a comparison of a name with itself, or a score outside of [0, 1].
    """
    if len(names) < 2:
        raise ValueError("two names at least are needed")
    if (first == second).any():
        raise ValueError("a comparison of a name with itself says nothing of its strength")
    if ((scores < 0) | (scores > 1)).any():
        raise ValueError("scores must be between 0 and 1")
    clusters = len(np.unique(units))
    counts = np.bincount(np.concatenate([first, second]), minlength=len(names))
    if why := _why_none(first, second, clusters, len(names)):
        return _none(names, counts, why)
    if (scores == 0.5).all():
        return _none(names, counts, "no comparison has a winner")
    # Since strengths sum to zero, the last one is minus the sum of the others
    contrast = np.vstack([np.eye(len(names) - 1), -np.ones(len(names) - 1)])
    rows = contrast[first] - contrast[second]
    if covariate is not None and np.ptp(covariate) > 0:
        rows = np.column_stack([rows, covariate])
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        return _none(names, counts, "length cannot be told from strength in these comparisons")
    if separated(rows, scores):
        return _none(names, counts, NO_BOUND)
    strengths, covariance = _likeliest(scores, rows, units, contrast)
    reach = _quantile(clusters - 1)
    half = reach * np.sqrt(np.diag(covariance))
    ranks = _ranks(strengths, covariance, reach)
    return {
        name: estimate(value, value - error, value + error, n) | {"ranks": ends}
        for name, value, error, n, ends in zip(names, strengths, half, counts, ranks, strict=True)
    }


def _likeliest(scores: Array, rows: Array, units: Array, contrast: Array) -> tuple[Array, Array]:
    """The maximum likelihood estimate of all strengths, (n,), and their covariance, (n, n), clustered by unit."""
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    model = sm.GLM(scores, rows, family=sm.families.Binomial())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerfectSeparationWarning)  # of a fit without residuals, which has its maximum
        found = model.fit(cov_type="cluster", cov_kwds={"groups": units})
    free = contrast.shape[1]
    return contrast @ found.params[:free], contrast @ found.cov_params()[:free, :free] @ contrast.T


def _quantile(freedom: int) -> float:
    """The quantile of Student's t for a 95% interval: with 20 clusters the normal one's intervals are too short."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def _ranks(strengths: Array, covariance: Array, reach: float) -> list[list[int]]:
    """The best and the worst rank of each, given which of the others are significantly stronger or weaker."""
    variance = np.diag(covariance)
    error = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0.0))
    lead = strengths[None, :] - strengths[:, None]  # of the column's over the row's
    above = (lead > reach * error).sum(1)
    below = (-lead > reach * error).sum(1)
    return [[int(up) + 1, len(strengths) - int(down)] for up, down in zip(above, below, strict=True)]


def _why_none(first: Array, second: Array, clusters: int, models: int) -> str | None:
    if clusters < MIN_PROMPTS:
        return f"fewer than {MIN_PROMPTS} prompts"
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first)), (first, second)), shape=(models, models))
    parts = connected_components(graph, directed=False, return_labels=False)
    return None if parts == 1 else "some models were never compared with the others"


def _none(names: Sequence[str], counts: Array, why: str) -> dict[str, Estimate]:
    return {name: estimate(None, None, None, n, why) for name, n in zip(names, counts, strict=True)}


def strengths(first: Array, second: Array, scores: Array, count: int, prior: float = PRIOR) -> list[Estimate]:
    """The posterior mode of each of `count` strengths, minus their mean, with the posterior's central 95% interval.

    With so few comparisons the posterior is not normal, and Laplace's approximation would cover only 92.7%. Quantiles
    are computed by importance sampling from a t distribution around the mode, with a fixed seed.

    Args:
        first: int (m,) index of one side of each comparison
        second: int (m,) index of the other side
        scores: (m,) in [0, 1], the score of the first side: win 1, tie ½, loss 0
        count: number of answers; one that was never compared has the prior's interval
        prior: standard deviation of the strengths
    """
    design = np.zeros((len(first), count))
    design[np.arange(len(first)), first] += 1
    design[np.arange(len(first)), second] -= 1
    scores = np.asarray(scores, float)
    mode, information = _mode(design, scores, prior)
    drawn, weights = _posterior(design, scores, prior, mode, information)
    drawn = drawn - drawn.mean(1, keepdims=True)
    played = np.abs(design).sum(0)
    values = mode - mode.mean()
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    bounds = [_quantiles(drawn[:, index], weights, tails) for index in range(count)]
    return [estimate(value, low, high, n) for value, (low, high), n in zip(values, bounds, played, strict=True)]


def _posterior(design: Array, scores: Array, prior: float, mode: Array, information: Array) -> tuple[Array, Array]:
    """Strengths drawn from the proposal, (draws, count), and their importance weights, (draws,), which sum to 1."""
    noise, count = np.random.default_rng(0), len(mode)
    normal = noise.standard_normal((_DRAWS, count))
    scale = np.sqrt(_FREEDOM / noise.chisquare(_FREEDOM, (_DRAWS, 1)))
    root = np.linalg.cholesky(np.linalg.inv(information))
    drawn = mode + scale * normal @ root.T
    lead = drawn @ design.T
    posterior = (scores * lead - np.logaddexp(0, lead)).sum(1) - (drawn**2).sum(1) / (2 * prior**2)
    distance = ((scale * normal) ** 2).sum(1)
    proposal = -(_FREEDOM + count) / 2 * np.log1p(distance / _FREEDOM)
    weights = np.exp(posterior - proposal - (posterior - proposal).max())
    return drawn, weights / weights.sum()


def _quantiles(values: Array, weights: Array, levels: Sequence[float]) -> list[float]:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) - weights[order] / 2
    return [float(np.interp(level, reached, values[order])) for level in levels]


def _mode(design: Array, scores: Array, prior: float) -> tuple[Array, Array]:
    """The posterior's mode and the information matrix there, by Newton's method: the log-posterior is concave."""
    mode = np.zeros(design.shape[1])
    own = np.eye(len(mode)) / prior**2
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-design @ mode))
        gradient = design.T @ (scores - chance) - mode / prior**2
        information = (design * (chance * (1 - chance))[:, None]).T @ design + own
        step = np.linalg.solve(information, gradient)
        mode = mode + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))  # at most 2 nats at a time
        if np.abs(step).max() < _TOLERANCE:
            break
    return mode, information
