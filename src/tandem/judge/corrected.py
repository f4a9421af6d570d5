"""The score of side 2 corrected for the judge's errors. Arithmetic only.

The quantity is the mean over prompts of what people say: 1 if side 2 is better, ½ if neither is, 0 if side 1 is. A tie
counts as half a win, in people's labels and in the judge's verdicts; the judge's own number for it is `mean_score`.

There are two estimates, by what is known of the judge's errors. With people's labels on a random subset of the compared
pairs: prediction-powered inference, valid whatever the judge's errors are. With labelled pairs of a data set only:
Rogan and Gladen's estimate, which assumes that the judge errs on the models' answers as often as on those pairs.
"""

from typing import NamedTuple

import numpy as np

from tandem.intervals import LEVEL, Array, Estimate, estimate

MIN_LABELS = 30  # with fewer labels, intervals cover too little where one side wins nearly always
CHANCE = 0.5
UNSEEN = 0.4  # added to the sum of squared errors on the labels: a judge without errors there may make some elsewhere


class Band(NamedTuple):
    """Estimates with the ends of their intervals: arrays of one shape."""

    value: Array
    low: Array
    high: Array


def from_labels(people: Array, judged: Array, others: Array) -> tuple[Estimate, float]:
    """People's mean score over all compared pairs, from labels on a random subset; and the weight λ of the judge.

    Args:
        people: (n,) in [0, 1], people's scores of side 2 on the labelled prompts
        judged: (n,) in [0, 1], the judge's scores on the same prompts; ½ where it gave no verdict
        others: (m,) in [0, 1], the judge's scores on the other prompts
    """
    if len(people) < MIN_LABELS:
        why = f"people labelled {len(people)} of the compared pairs; {MIN_LABELS} are needed"
        return estimate(None, None, None, len(people), why), 0.0
    band, weight = powered(people, judged, others)
    return estimate(band.value.item(), band.low.item(), band.high.item(), len(people)), weight.item()


def labels_alone(people: Array) -> Estimate:
    """The mean of people's scores, (n,), with the interval that `from_labels` gives without a judge."""
    if len(people) < MIN_LABELS:
        return estimate(None, None, None, len(people), f"fewer than {MIN_LABELS} labels")
    band, _ = powered(people, np.full(people.shape, CHANCE), np.zeros(0))
    return estimate(band.value.item(), band.low.item(), band.high.item(), len(people))


def powered(people: Array, judged: Array, others: Array) -> tuple[Band, Array]:
    """Prediction-powered estimates of a mean, and λ, one for each index of the leading axes.

    With H people's scores and f the judge's, θ = mean(H) + λ (mean(f of the others) − mean(f)), with the variance
    var(H − λf)/n + λ² var(f of the others)/m (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023, Prediction-powered
    inference, Science 382). λ minimises the variance (Angelopoulos, Duchi and Zrnic 2023, PPI++, section 6) and is
    clipped to [0, 1]: a judge that knows nothing gets a λ near 0 and does no harm. The interval is Wilson's, for the
    number of labels that would give this variance (Kott and Carr 1997 do so for surveys), with Student's quantile: the
    normal interval covers too little near 0 and 1.

    Args:
        people: (…, n)
        judged: (…, n)
        others: (…, m); m may be 0: then λ is 0
    """
    n, m = people.shape[-1], others.shape[-1]
    centred = judged - judged.mean(-1, keepdims=True)
    spread = (centred**2).sum(-1)
    together = (centred * people).sum(-1)
    known = spread > 0
    weight = np.where(known, together / np.where(known, spread, 1.0), 0.0) / (1 + n / m) if m else np.zeros_like(spread)
    weight = np.clip(weight, 0.0, 1.0)
    value = people.mean(-1)
    variance = np.zeros_like(value)
    if m:
        value = value + weight * (others.mean(-1) - judged.mean(-1))
        variance = weight**2 * others.var(-1) / m
    errors = people - weight[..., None] * judged
    errors = ((errors - errors.mean(-1, keepdims=True)) ** 2).sum(-1)
    variance = variance + (errors + UNSEEN) / ((n - 2) * n)
    return _wilson(np.clip(value, 0.0, 1.0), variance, n), weight


def _wilson(value: Array, variance: Array, n: int) -> Band:
    """Wilson's interval of a share `value` that was estimated from `n` labels with this variance."""
    from scipy.stats import t

    reach = t.ppf((1 + LEVEL) / 2, n - 2)
    size = np.maximum(value * (1 - value) / variance, n * 0.5)
    middle = (size * value + reach**2 / 2) / (size + reach**2)
    half = reach / (size + reach**2) * np.sqrt(size * value * (1 - value) + reach**2 / 4)
    return Band(value, np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0))


def from_error_rates(judged: Array, right: Array) -> Estimate:
    """People's mean score over the compared pairs, if the judge is right on them as often as on the labelled pairs.

    The judge sees each pair in both orders and without names, so that its error rate does not depend on which side is
    better: its mean score is ½ + (2a − 1)(θ − ½), with a its accuracy. Solved for θ, this is Rogan and Gladen 1978
    (Estimating prevalence from the results of a screening test) with sensitivity and specificity a. The interval is
    Fieller's (1954) for a quotient of two means, which is valid where a is only a little above ½ too. There is no value
    where the judge is not better than chance.

    Args:
        judged: (n,) in [0, 1], the judge's score of side 2 on the compared pairs
        right: (k,) in [0, 1], whether the judge was right on each pair labelled by people, ½ for a tie
    """
    if min(len(judged), len(right)) < MIN_LABELS:
        return estimate(None, None, None, len(right), f"fewer than {MIN_LABELS} compared or labelled pairs")
    if not bool(better_than_chance(right)):
        return estimate(None, None, None, len(right), "on the labelled pairs the judge is not better than chance")
    band = quotient(judged, right)
    return estimate(band.value.item(), band.low.item(), band.high.item(), len(right))


def better_than_chance(right: Array) -> Array:
    """Whether Wilson's interval of the accuracy on labelled pairs, (…, k), lies above ½."""
    from scipy.stats import norm

    count = right.shape[-1]
    reach = norm.ppf((1 + LEVEL) / 2)
    share = right.mean(-1)
    return share - CHANCE > reach * np.sqrt(CHANCE * (1 - CHANCE) / count)


def quotient(judged: Array, right: Array) -> Band:
    """½ + (mean(judged) − ½) / (2 mean(right) − 1) in [0, 1] with Fieller's interval; leading axes as in `powered`."""
    from scipy.stats import norm

    reach = norm.ppf((1 + LEVEL) / 2)
    lead, gain = judged.mean(-1) - CHANCE, 2 * right.mean(-1) - 1
    var_lead = judged.var(-1, ddof=1) / judged.shape[-1]
    var_gain = 4 * right.var(-1, ddof=1) / right.shape[-1]
    # All t with (lead − t gain)² ≤ reach² (var_lead + t² var_gain)
    curve = gain**2 - reach**2 * var_gain
    root = np.sqrt(np.maximum((lead * gain) ** 2 - curve * (lead**2 - reach**2 * var_lead), 0.0))
    bounded = curve > 0
    safe = np.where(bounded, curve, 1.0)
    low = np.where(bounded, (lead * gain - root) / safe, -CHANCE)
    high = np.where(bounded, (lead * gain + root) / safe, CHANCE)
    value = np.divide(lead, gain, out=np.zeros_like(lead), where=gain > 0)
    return Band(*(np.clip(CHANCE + part, 0.0, 1.0) for part in (value, low, high)))
