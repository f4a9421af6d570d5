"""The score corrected for the judge's errors: by hand, and how often its intervals hold in 10,000 runs."""

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from tandem.judge import corrected
from tandem.judge.corrected import MIN_LABELS, better_than_chance, from_error_rates, from_labels, labels_alone, powered

RUNS = 10_000
COVERED = 0.935
ACCURACIES = (0.6, 0.75, 0.9)


def people(rng, shape, score, ties=0.1):
    """What people say, 1, ½ or 0, with that mean."""
    drawn = rng.random(shape)
    return np.where(drawn < ties, 0.5, (drawn < ties / 2 + score) * 1.0)


def verdicts(rng, truth, accuracy, lean=0.0):
    """The mean of a judge's two orders, each right so often; it flips a coin where people see a tie.

    With `lean`, it is so much more accurate where side 2 is the better one, and so much less where side 1 is.
    """

    def order():
        right = rng.random(truth.shape) < accuracy + lean * np.sign(truth - 0.5)
        better = np.where(truth == 0.5, rng.random(truth.shape) < 0.5, truth == 1)
        return np.where(right, better, ~better) * 1.0

    return (order() + order()) / 2


def covered(band, score):
    return ((band.low <= score) & (score <= band.high)).mean()


# ---- by hand


def test_the_prediction_powered_mean_by_its_formula():
    rng = np.random.default_rng(0)
    truth = people(rng, 240, 0.6)
    judged = verdicts(rng, truth, 0.8)
    got, weight = from_labels(truth[:60], judged[:60], judged[60:])
    slope = np.cov(truth[:60], judged[:60])[0, 1] / np.var(judged[:60], ddof=1)
    assert weight == pytest.approx(slope / (1 + 60 / 180))
    assert got["value"] == pytest.approx(truth[:60].mean() - weight * (judged[:60].mean() - judged[60:].mean()))
    assert got["n"] == 60 and got["low"] < got["value"] < got["high"]


def test_without_a_judge_it_is_about_wilsons_interval():
    scores = np.repeat([0.0, 1.0], [40, 60])
    got = labels_alone(scores)
    low, high = proportion_confint(60, 100, method="wilson")
    assert got["value"] == pytest.approx(0.6)
    assert (got["low"], got["high"]) == (pytest.approx(low, abs=0.004), pytest.approx(high, abs=0.004))
    useless, weight = from_labels(scores, np.full(100, 0.5), np.full(300, 0.5))
    assert weight == 0 and useless == pytest.approx(got)


def test_labels_all_alike_and_a_judge_without_fault_still_have_an_interval():
    got, _ = from_labels(np.ones(50), np.ones(50), np.ones(150))
    assert got["value"] == 1 and 0.85 < got["low"] < 0.99 and got["high"] == 1


def test_a_judge_who_is_always_wrong_gets_no_weight():
    truth = np.tile([0.0, 1.0], 50)
    got, weight = from_labels(truth, 1 - truth, np.zeros(300))
    assert weight == 0 and got == pytest.approx(labels_alone(truth))


def test_rogan_and_gladen_by_hand():
    """Right on 80 of 100: 62% of the judge's are 0.5 + 0.12 / 0.6 = 70% of people's."""
    judged, right = np.repeat([1.0, 0.0], [62, 38]), np.repeat([1.0, 0.0], [80, 20])
    got = from_error_rates(judged, right)
    assert got["value"] == pytest.approx(0.7)
    # both ends solve (0.12 − 0.6 t)² = z² (var + t² var'), t the score less ½
    for end in (got["low"] - 0.5, got["high"] - 0.5):
        noise = 1.959964**2 * (judged.var(ddof=1) / 100 + end**2 * 4 * right.var(ddof=1) / 100)
        assert (0.12 - 0.6 * end) ** 2 == pytest.approx(noise, rel=1e-5)


def test_ties_count_half_for_both():
    """A judge that ties where people do, and is right elsewhere: nothing to correct."""
    judged, right = np.repeat([1.0, 0.5, 0.0], [30, 40, 30]), np.ones(100)
    assert from_error_rates(judged, right)["value"] == 0.5
    halved = from_error_rates(np.repeat([1.0, 0.5], [50, 50]), np.repeat([1.0, 0.5], [50, 50]))
    assert halved["value"] == pytest.approx(1.0)  # it ties on half of what is clear: 75% is all


@pytest.mark.parametrize(
    ("judged", "right", "why"),
    [
        (np.ones(100), np.repeat([1.0, 0.0], [59, 41]), "not better than chance"),
        (np.ones(100), np.repeat([1.0, 0.0], [20, 80]), "not better than chance"),
        (np.ones(100), np.ones(MIN_LABELS - 1), "fewer than"),
        (np.zeros(0), np.ones(100), "fewer than"),
    ],
)
def test_no_correction_has_its_reason(judged, right, why):
    got = from_error_rates(judged, right)
    assert got["value"] is None and why in got["why"]


def test_too_few_labels_have_their_reason():
    got, _ = from_labels(np.ones(MIN_LABELS - 1), np.ones(MIN_LABELS - 1), np.ones(50))
    assert got["value"] is None and f"{MIN_LABELS} are needed" in got["why"]
    assert labels_alone(np.ones(3))["value"] is None


# ---- 10,000 runs


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize(("score", "labels", "others"), [(0.6, 50, 150), (0.75, 100, 200)])
def test_prediction_powered_intervals_hold_and_are_no_wider_than_peoples(accuracy, score, labels, others):
    rng = np.random.default_rng(25)
    truth = people(rng, (RUNS, labels + others), score)
    judged = verdicts(rng, truth, accuracy)
    band, _ = powered(truth[:, :labels], judged[:, :labels], judged[:, labels:])
    assert covered(band, score) >= COVERED
    assert abs(band.value.mean() - score) < 0.005
    low, high = proportion_confint(truth[:, :labels].sum(1), labels, method="wilson")
    width = (band.high - band.low).mean() / (high - low).mean()
    assert width <= (1.2 if accuracy < 0.9 else 0.9)


@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_intervals_from_error_rates_hold_where_their_assumption_does(accuracy):
    rng = np.random.default_rng(26)
    judged = verdicts(rng, people(rng, (RUNS, 200), 0.6), accuracy)
    right = verdicts(rng, np.ones((RUNS, 100)), accuracy)
    given = better_than_chance(right)
    band = corrected.quotient(judged, right)
    assert covered(band, 0.6) >= COVERED
    told = type(band)(*(part[given] for part in band))
    assert covered(told, 0.6) >= COVERED
    assert given.mean() > (0.3 if accuracy == 0.6 else 0.99)


@pytest.mark.parametrize(("accuracy", "lean"), [(0.65, 0.0), (0.75, 0.15)])
def test_a_shift_breaks_error_rates_and_not_labels(accuracy, lean):
    """The judge is right on 90% of the labelled pairs; on the models' less often, or where it is side 2's length."""
    rng = np.random.default_rng(27)
    truth = people(rng, (RUNS, 300), 0.7)
    judged = verdicts(rng, truth, accuracy, lean)
    right = verdicts(rng, np.ones((RUNS, 100)), 0.9)
    rates = corrected.quotient(judged, right)
    labels, _ = powered(truth[:, :100], judged[:, :100], judged[:, 100:])
    raw = judged.mean(1)
    assert covered(rates, 0.7) < 0.7
    assert covered(labels, 0.7) >= COVERED
    assert abs(labels.value.mean() - 0.7) < 0.005 < abs(rates.value.mean() - 0.7)
    assert abs(raw.mean() - 0.7) > 0.01
