"""Strengths of several models from pairwise verdicts, with intervals. Arithmetic only.

The model of Bradley and Terry (1952): the chance that i beats j is expit(θ_i − θ_j). Fitted as a binomial GLM, a tie as
half a win; errors are clustered by prompt, since verdicts on one prompt are not independent.
"""

from collections.abc import Sequence

import numpy as np

from tandem.intervals import LEVEL, Array, Estimate, estimate
from tandem.judge.statistics import MIN_PROMPTS, separated


def fit(
    first: Array, second: Array, scores: Array, units: Array, names: Sequence[str], covariate: Array | None = None
) -> dict[str, Estimate]:
    """Strength of each of `names` in log-odds; they sum to zero, so that a strength is that against the average model.

    No value can be had where some models were never compared, even by way of others, or where one of them, or one part
    of them, won every comparison or lost it: then each estimate says why.

    Args:
        first: int (m,) index into `names` of one side of each comparison
        second: int (m,) of the other side
        scores: (m,) in [0, 1], what the first side scored: win 1, tie ½, loss 0, or a mean of these
        units: (m,) the prompt of each comparison, by any number
        covariate: (m,) what else may explain a score, as the difference in length; 0 where it has no say

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
    # The last strength is minus the sum of the others
    contrast = np.vstack([np.eye(len(names) - 1), -np.ones(len(names) - 1)])
    rows = contrast[first] - contrast[second]
    if covariate is not None and np.ptp(covariate) > 0:
        rows = np.column_stack([rows, covariate])
    if np.linalg.matrix_rank(rows) < rows.shape[1]:
        return _none(names, counts, "length cannot be told from strength in these comparisons")
    if separated(rows, scores):
        return _none(names, counts, "some model won or lost all of its comparisons: its strength has no bound")
    import statsmodels.api as sm
    from scipy.stats import norm

    model = sm.GLM(scores, rows, family=sm.families.Binomial())
    found = model.fit(cov_type="cluster", cov_kwds={"groups": units})
    free = len(names) - 1
    strengths = contrast @ found.params[:free]
    errors = np.sqrt(np.diag(contrast @ found.cov_params()[:free, :free] @ contrast.T))
    reach = norm.ppf((1 + LEVEL) / 2) * errors
    return {
        name: estimate(value, value - half, value + half, n)
        for name, value, half, n in zip(names, strengths, reach, counts, strict=True)
    }


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
