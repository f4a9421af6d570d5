"""The arithmetic: by hand, against a second way, and on simulated judges whose truth is known."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from tandem.judge import statistics as st

LOSS, TIE, WIN = 0, 1, 2


def votes_of(*prompts):
    """`votes` of prompts given as (outcome with side 1 first, outcome with side 2 first)."""
    votes = np.zeros((len(prompts), 2, 3), dtype=np.int64)
    for index, outcomes in enumerate(prompts):
        for order, outcome in enumerate(outcomes):
            votes[index, order, outcome] += 1
    return votes


def votes_from(outcomes):
    """`votes` of an array (n, 2) of outcomes 0, 1, 2."""
    return np.eye(3, dtype=np.int64)[outcomes]


def summarise(votes, length=None, missing=0):
    n = len(votes)
    length = np.zeros(n) if length is None else length
    return st.summarise(votes, length, np.zeros(n, dtype=bool), missing, seed=0)


HAND = votes_of((WIN, WIN), (WIN, WIN), (WIN, TIE), (WIN, LOSS), (LOSS, WIN), (TIE, TIE), (LOSS, LOSS), (TIE, LOSS))


def test_both_ways_of_counting_by_hand():
    assert st.prompt_scores(HAND).tolist() == [1, 1, 0.75, 0.5, 0.5, 0.5, 0, 0.25]
    agree = st.count(st.strict_outcomes(HAND))
    assert (agree["wins"], agree["ties"], agree["losses"]) == (2, 5, 1)
    mean = st.count(st.mean_outcomes(HAND))
    assert (mean["wins"], mean["ties"], mean["losses"]) == (3, 3, 2)
    assert mean["win_rate"]["value"] == 0.6
    # sign test, 3 of 5: P(X ≥ 3) + P(X ≤ 2) = 1
    assert mean["sign_test_p"] == pytest.approx(1.0)
    assert st.count(np.array([1] * 5))["sign_test_p"] == pytest.approx(2 / 2**5)


def test_wilson_is_the_score_interval():
    """Its ends are the shares p that put the observed share 1.96 standard errors of p away."""
    interval = st.wilson(30, 50, "")
    z = norm.ppf(0.975)
    for end in (interval["low"], interval["high"]):
        assert abs(0.6 - end) == pytest.approx(z * np.sqrt(end * (1 - end) / 50))


def test_habits_by_hand():
    # Side 2 has 4 wins and 2 losses where side 1 stands first, 3 wins and 3 losses where it stands first itself: the
    # first place got 2 of the one and 3 of the other
    first = st.first_position_rate(HAND)
    assert (first["value"], first["n"]) == (pytest.approx((2 + 3) / 12), 12)
    flips = st.flip_rate(HAND)
    assert (flips["value"], flips["n"]) == (pytest.approx(2 / 5), 5)


def test_several_samples_are_averaged_within_their_order():
    votes = np.array([[[1, 0, 2], [0, 0, 1]]])  # 2 of 3 won, then 1 of 1
    assert st.prompt_scores(votes) == pytest.approx([(2 / 3 + 1) / 2])
    # a prompt that is even by exact arithmetic: 2/3 + 1/3
    even = np.array([[[1, 0, 2], [2, 0, 1]]])
    assert st.mean_outcomes(even).tolist() == [0]


def test_missing_prompts_count_against_and_for():
    bounds = summarise(HAND, missing=2)["bounds"]
    assert bounds["missing_as_losses"]["win_rate"]["value"] == pytest.approx(2 / 5)
    assert bounds["missing_as_wins"]["win_rate"]["value"] == pytest.approx(4 / 5)
    assert bounds["missing_as_losses"]["mean_score"]["value"] == pytest.approx(4.5 / 10)
    assert bounds["missing_as_wins"]["mean_score"]["value"] == pytest.approx(6.5 / 10)


def test_sides_swapped_give_mirrored_results():
    rng = np.random.default_rng(3)
    votes = votes_from(rng.choice(3, (200, 2), p=[0.3, 0.2, 0.5]))
    length = rng.normal(20, 100, 200)
    there, back = summarise(votes, length), summarise(votes[:, ::-1, ::-1], -length)
    for name in ("length_controlled", "mean_score"):
        assert back[name]["value"] == pytest.approx(1 - there[name]["value"])
        assert back[name]["low"] == pytest.approx(1 - there[name]["high"], abs=0.004)  # the bootstrap's own noise
    assert back["first_position_rate"]["value"] == pytest.approx(there["first_position_rate"]["value"])
    assert back["when_not_longer"]["side_1"] == there["when_not_longer"]["side_2"]


@pytest.mark.parametrize(
    ("votes", "reason"),
    [
        (votes_of(*[(WIN, LOSS)] * 30), "no prompt is decisive"),
        (votes_of(*[(TIE, TIE)] * 30), "no prompt is decisive"),
        (votes_of(), "no prompt is decisive"),
    ],
)
def test_where_no_prompt_is_decisive_the_result_is_defined(votes, reason):
    result = summarise(votes, np.arange(len(votes)) - 15.0)
    for way in ("orders_agree", "mean_of_orders"):
        assert result[way]["win_rate"] == {"value": None, "low": None, "high": None, "n": 0, "why": reason}
        assert result[way]["sign_test_p"] == 1.0
    assert result["mean_score"]["low"] is None and result["mean_score"]["why"]


@pytest.mark.parametrize("n", [1, 2, 3, 25])
@pytest.mark.parametrize("outcomes", [(WIN, WIN), (LOSS, LOSS), (TIE, TIE), (WIN, LOSS), (TIE, WIN)])
def test_equal_scores_have_no_bootstrap_interval_and_everything_else_is_finite(n, outcomes):
    result = summarise(votes_of(*[outcomes] * n), np.arange(n) - n / 2)
    assert result["mean_score"]["low"] is None and "nothing to resample" in result["mean_score"]["why"]
    assert not [number for number in _numbers(result) if not np.isfinite(number)]


def _numbers(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in _numbers(part)]
    return [value] if isinstance(value, float) else []


def test_bca_equals_its_definition():
    """Efron 1987: percentiles of the bootstrap moved by z0 and the jackknife's acceleration."""
    scores = np.random.default_rng(1).beta(0.7, 0.4, 40)
    got = st.mean_score(scores, seed=5)
    rng = np.random.default_rng(9)
    means = rng.choice(scores, (200_000, 40)).mean(1)
    z0 = norm.ppf((means < scores.mean()).mean())
    left_out = (scores.sum() - scores) / 39
    pull = left_out.mean() - left_out
    a = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    for end, level in (("low", 0.025), ("high", 0.975)):
        z = norm.ppf(level)
        share = norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
        assert got[end] == pytest.approx(np.quantile(means, share), abs=0.004)


# ---- length


def test_length_control_without_length_is_the_mean_score():
    """The model without its length term is saturated at the marginal mean; a length of no effect changes it little."""
    rng = np.random.default_rng(0)
    outcomes = rng.choice(3, (4000, 1), p=[0.3, 0.1, 0.6])
    votes = votes_from(np.repeat(outcomes, 2, axis=1))
    controlled = st.length_controlled(votes, rng.normal(0, 50, 4000))
    assert controlled["value"] == pytest.approx(st.prompt_scores(votes).mean(), abs=0.003)
    # Both orders of a prompt say the same: the interval is that of 4,000 prompts, not of 8,000 calls
    spread = st.prompt_scores(votes).std() / np.sqrt(4000)
    assert controlled["high"] - controlled["low"] == pytest.approx(2 * 1.96 * spread, rel=0.03)


def simulate_length_bias(n, rng, shift=0.54):
    """A judge that only sees length: P(answer 2 preferred) grows with its advantage; answer 2 is longer on average."""
    difference = rng.normal(shift, 1.0, n) * 300
    prefers = expit(0.75 * np.tanh(difference / difference.std()))
    wins = rng.random(n) < prefers
    return votes_from(np.where(wins, WIN, LOSS)[:, None].repeat(2, axis=1)), difference


def test_a_judge_of_length_alone_is_corrected_below_significance():
    rng = np.random.default_rng(2)
    votes, difference = simulate_length_bias(200_000, rng)
    raw = st.prompt_scores(votes).mean()
    assert raw == pytest.approx(0.558, abs=0.003)  # what the bias comes to
    significant = corrected = 0
    for seed in range(40):
        votes, difference = simulate_length_bias(2000, np.random.default_rng(seed))
        significant += st.count(st.strict_outcomes(votes))["win_rate"]["low"] > 0.5
        controlled = st.length_controlled(votes, difference)
        corrected += controlled["low"] <= 0.5 <= controlled["high"]
        assert controlled["length_effect"] > 0.3
    assert significant == 40
    assert corrected >= 36  # 95% of 40 are 38


def test_a_true_advantage_survives_the_control_for_length():
    rng = np.random.default_rng(4)
    difference = rng.normal(100, 300, 2000)
    wins = rng.random(2000) < expit(0.5 + 0.75 * np.tanh(difference / difference.std()))
    controlled = st.length_controlled(votes_from(np.where(wins, WIN, LOSS)[:, None].repeat(2, axis=1)), difference)
    assert controlled["low"] < expit(0.5) < controlled["high"]
    assert controlled["low"] > 0.5


@pytest.mark.parametrize(
    ("votes", "length", "reason"),
    [
        (votes_of(*[(WIN, WIN), (LOSS, LOSS)] * 9), np.arange(18.0), "fewer than"),
        (votes_of(*[(WIN, WIN), (LOSS, LOSS)] * 20), np.zeros(40), "equally long"),
        (votes_of(*[(WIN, WIN), (LOSS, LOSS)] * 20), np.full(40, 5.0), "the same on every prompt"),
        (votes_of(*[(WIN, WIN)] * 40), np.arange(40) - 20.0, "perfectly"),
        (votes_of(*[(TIE, TIE)] * 40), np.arange(40) - 20.0, "perfectly"),
        (votes_of(*[(WIN, LOSS)] * 40), np.arange(40) - 20.0, "perfectly"),
        (votes_of(*[(LOSS, LOSS)] * 20, *[(WIN, WIN)] * 20), np.arange(40) - 19.5, "perfectly"),
    ],
    ids=["few", "no length", "one length", "all won", "all tied", "always B", "longer always wins"],
)
def test_where_length_cannot_be_controlled_the_result_says_why(votes, length, reason):
    result = st.length_controlled(votes, length)
    assert result["value"] is None and reason in result["why"]


def test_separation_is_found_exactly():
    rng = np.random.default_rng(0)
    rows = np.column_stack([np.ones(60), rng.normal(size=60)])
    line = (rows[:, 1] > 0.3).astype(float)
    assert st.separated(rows, line)
    broken = line.copy()
    broken[rows[:, 1].argmax()] = 0.0  # one point on the wrong side
    assert not st.separated(rows, broken)
    halves = line.copy()
    halves[:] = 0.5
    assert not st.separated(rows, halves)


def test_when_not_longer_leaves_out_prompts_on_which_length_may_have_won():
    votes = votes_of((WIN, WIN), (WIN, WIN), (LOSS, LOSS), (WIN, WIN))
    result = st.when_not_longer(votes, np.array([5.0, -5.0, -3.0, 0.0]))
    assert (result["side_2"]["value"], result["side_2"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (result["side_1"]["value"], result["side_1"]["n"]) == (0.0, 2)


# ---- what the intervals promise


def coverage(runs, n, seed):
    """Share of runs whose 95% interval holds the truth, for a fair judge and a true 60%: (Wilson, BCa)."""
    rng = np.random.default_rng(seed)
    held = np.zeros(2)
    for run in range(runs):
        wins = rng.random(n) < 0.6
        votes = votes_from(np.where(wins, WIN, LOSS)[:, None].repeat(2, axis=1))
        for index, interval in enumerate(
            (st.count(st.strict_outcomes(votes))["win_rate"], st.mean_score(st.prompt_scores(votes), seed=run))
        ):
            held[index] += interval["low"] <= 0.6 <= interval["high"]
    return held / runs


def test_a_fair_judge_is_covered(monkeypatch):
    monkeypatch.setattr("tandem.intervals.RESAMPLES", 499)
    for share in coverage(400, 250, seed=1):
        # ±3.3 standard errors of 400 runs around 95%
        assert 0.914 <= share <= 0.986


@pytest.mark.slow
def test_a_fair_judge_is_covered_as_often_as_promised(monkeypatch):
    monkeypatch.setattr("tandem.intervals.RESAMPLES", 1_999)
    for share in coverage(4000, 250, seed=1):
        assert 0.94 <= share <= 0.965


def test_the_prompt_is_the_unit_however_many_verdicts_it_has():
    rng = np.random.default_rng(0)
    once = votes_from(rng.choice([LOSS, WIN], (100, 1)).repeat(2, axis=1))
    few, many = summarise(once, np.arange(100) - 50.0), summarise(once * 7, np.arange(100) - 50.0)
    for name in ("mean_score", "orders_agree", "length_controlled", "order_flip_rate"):
        assert few[name] == many[name]


def test_ten_thousand_verdicts_take_seconds_and_little_memory():
    rng = np.random.default_rng(0)
    votes = votes_from(rng.choice(3, (5000, 2), p=[0.3, 0.2, 0.5]))
    summarise(votes[:50], rng.normal(0, 100, 50))  # imports
    tracemalloc.start()
    began = time.monotonic()
    summarise(votes, rng.normal(0, 100, 5000))
    assert time.monotonic() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 2**29
    tracemalloc.stop()
