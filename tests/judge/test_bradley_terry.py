"""Bradley-Terry strengths: against another way of fitting them, what has no value, and how often intervals hold."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from tandem.judge.bradley_terry import fit

NAMES = ["base", "sft", "dpo"]


def play(rng, strengths, prompts):
    """Every pair of models on every prompt; sides, scores and prompts of the comparisons."""
    pairs = [(i, j) for i in range(len(strengths)) for j in range(i)]
    first, second = np.tile(np.array(pairs), (prompts, 1)).T
    scores = (rng.random(len(first)) < expit(strengths[first] - strengths[second])).astype(float)
    return first, second, scores, np.repeat(np.arange(prompts), len(pairs))


def test_strengths_are_those_of_the_greatest_likelihood():
    rng = np.random.default_rng(0)
    first, second, scores, units = play(rng, np.array([-0.5, 0.1, 0.4]), 60)
    scores[::7] = 0.5

    def loss(free):
        strengths = np.array([*free, -sum(free)])
        chance = expit(strengths[first] - strengths[second])
        return -(scores * np.log(chance) + (1 - scores) * np.log1p(-chance)).sum()

    best = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x
    found = fit(first, second, scores, units, NAMES)
    assert [found[name]["value"] for name in NAMES] == pytest.approx([*best, -best.sum()], abs=1e-5)
    assert sum(one["value"] for one in found.values()) == pytest.approx(0)
    assert all(one["low"] < one["value"] < one["high"] and one["n"] == 120 for one in found.values())


def test_two_models_are_the_logit_of_the_win_rate():
    """36 of 48: log-odds ln 3 between the two, half of it each."""
    scores = np.array([1.0] * 36 + [0.0] * 12)
    found = fit(np.zeros(48, int), np.ones(48, int), scores, np.arange(48), ["a", "b"])
    assert found["a"]["value"] == pytest.approx(np.log(3) / 2)
    assert found["b"]["value"] == pytest.approx(-np.log(3) / 2)


def test_an_advantage_of_length_alone_is_taken_out():
    rng = np.random.default_rng(1)
    first, second = np.zeros(4000, int), np.ones(4000, int)
    length = rng.normal(0.8, 1, 4000)
    scores = (rng.random(4000) < expit(length)).astype(float)
    raw = fit(first, second, scores, np.arange(4000), ["a", "b"])["a"]
    controlled = fit(first, second, scores, np.arange(4000), ["a", "b"], covariate=length)["a"]
    assert raw["low"] > 0.2
    assert controlled["low"] < 0 < controlled["high"]


@pytest.mark.parametrize(
    ("first", "second", "score", "why"),
    [
        ([0] * 30, [1] * 30, [1, 0] * 15, "never compared"),  # nobody met dpo
        ([0, 1] * 30, [1, 2] * 30, [1, 0, 0, 0] * 15, "won or lost all"),  # sft always lost to dpo
        ([0, 1], [1, 2], [1, 0], "fewer than 20 prompts"),
        ([0, 1] * 30, [1, 2] * 30, [0.5] * 60, "no comparison has a winner"),
    ],
)
def test_what_has_no_value_says_why(first, second, score, why):
    found = fit(np.array(first), np.array(second), np.array(score, float), np.arange(len(first)), NAMES)
    assert all(one["value"] is None and why in one["why"] for one in found.values())


def test_what_is_no_comparison_is_refused():
    ones = np.ones(30, int)
    with pytest.raises(ValueError, match="with itself"):
        fit(ones, ones, np.ones(30), ones, NAMES)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit(ones, 0 * ones, 2.0 * ones, ones, NAMES)
    with pytest.raises(ValueError, match="two names"):
        fit(ones, 0 * ones, 1.0 * ones, ones, ["one"])


TRUTH = np.array([-0.4, 0.0, 0.4])


def coverage(runs, accuracy=1.0, prompts=60):
    """How often each interval holds what endless verdicts of a judge that is right so often would give, and its width.

    Such verdicts are a mixture of the Bradley-Terry model with a coin's; each prompt also has strengths of its own, so
    that verdicts on one prompt go together.
    """
    rng = np.random.default_rng(7)
    pairs = np.array([(i, j) for i in range(3) for j in range(i)])
    first, second = np.tile(pairs, (prompts, 1)).T
    units = np.repeat(np.arange(prompts), len(pairs))

    def chances(own):
        better = expit(own[:, pairs[:, 0]] - own[:, pairs[:, 1]])
        return (0.5 + (2 * accuracy - 1) * (better - 0.5)).ravel()

    many = TRUTH + rng.normal(0, 1, (200_000, 3))
    mean = np.tile(chances(many).reshape(-1, len(pairs)).mean(0), prompts)
    wanted = [found["value"] for found in fit(first, second, mean, units, NAMES).values()]
    held, widths = [], []
    for _ in range(runs):
        chance = chances(TRUTH + rng.normal(0, 1, (prompts, 3)))
        scores = (rng.random((2, len(chance))) < chance).mean(0)  # the mean of both orders
        found = fit(first, second, scores, units, NAMES).values()
        held.append([one["low"] <= value <= one["high"] for one, value in zip(found, wanted, strict=True)])
        widths.append([one["high"] - one["low"] for one in found])
    return np.mean(held, axis=0), np.mean(widths, axis=0)


def test_intervals_hold_the_truth():
    assert (coverage(150)[0] > 0.90).all()


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.6, 0.75, 0.9])
def test_intervals_hold_the_truth_in_ten_thousand_runs(accuracy):
    held, width = coverage(10_000, accuracy)
    print(accuracy, held, width)
    assert (held >= 0.935).all()


def test_ranks_are_what_the_differences_leave():
    """Two models that cannot be told apart share two places, and the third, far behind, has its own."""
    rng = np.random.default_rng(3)
    found = fit(*play(rng, np.array([1.5, 1.5, -1.5]), 200), NAMES)
    assert [found[name]["ranks"] for name in NAMES] == [[1, 2], [1, 2], [3, 3]]
    clear = fit(*play(rng, np.array([-1.5, 0.0, 1.5]), 200), NAMES)
    assert [clear[name]["ranks"] for name in NAMES] == [[3, 3], [2, 2], [1, 1]]
