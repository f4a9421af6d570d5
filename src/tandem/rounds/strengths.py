"""Bradley–Terry strengths of the few answers to one prompt, with intervals. Arithmetic only.

Of four answers some win or lose every comparison, so that maximum likelihood has no bound (`judge.bradley_terry` says
so there). A normal prior gives one: θ_i ~ N(0, PRIOR²), logit P(i beats j) = θ_i − θ_j (Bradley and Terry 1952; the
prior as in Davidson and Solomon 1973). A tie counts as half a win.
"""

from collections.abc import Sequence

import numpy as np

from tandem.intervals import LEVEL, Array, Estimate, estimate

PRIOR = 1.5  # standard deviation of strengths in nats: of two answers the better wins 8 times out of 10 on average
_STEPS = 50
_TOLERANCE = 1e-10
_DRAWS = 4000
_FREEDOM = 5  # degrees of freedom of the t distribution that is drawn from, whose tails are wider than the posterior's


def strengths(first: Array, second: Array, scores: Array, count: int, prior: float = PRIOR) -> list[Estimate]:
    """The posterior mode of each of `count` strengths, less their mean, with the posterior's central 95% interval.

    Of so few comparisons the posterior is no normal distribution, and Laplace's interval would cover 92.7%. Quantiles
    are by importance sampling from a t distribution about the mode, with fixed draws.

    Args:
        first: int (m,) index of one side of each comparison
        second: int (m,) of the other
        scores: (m,) in [0, 1], what the first side scored: win 1, tie ½, loss 0
        count: answers; one that was never compared has the prior's interval
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
    """Strengths (draws, count) and their weights, which sum to 1."""
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
    """The posterior's mode and its information there, by Newton's method; the log-posterior is strictly concave."""
    mode = np.zeros(design.shape[1])
    own = np.eye(len(mode)) / prior**2
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-design @ mode))
        gradient = design.T @ (scores - chance) - mode / prior**2
        information = (design * (chance * (1 - chance))[:, None]).T @ design + own
        step = np.linalg.solve(information, gradient)
        mode = mode + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))  # no step beyond what is sane
        if np.abs(step).max() < _TOLERANCE:
            break
    return mode, information


def round_robin(count: int) -> list[tuple[int, int]]:
    """Each pair of `count` answers once."""
    return [(one, other) for one in range(count) for other in range(one + 1, count)]


def swiss_round(points: Sequence[float], met: set[frozenset[int]]) -> list[tuple[int, int]]:
    """Pairs of answers for one more round: those of like points that have not met; with an odd number one rests."""
    left = sorted(range(len(points)), key=lambda index: (-points[index], index))
    pairs = []
    while len(left) > 1:
        one = left.pop(0)
        at = next((at for at, other in enumerate(left) if frozenset((one, other)) not in met), None)
        if at is not None:
            pairs.append((one, left.pop(at)))
    return pairs
