"""When a judge may be believed, and what it may then be said to have found."""

from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score

from tandem.data.held_out import chosen_answers
from tandem.judge import calibration, conclusions, statistics
from tandem.judge.requests import Comparison

LOSS, TIE, WIN = 0, 1, 2


def votes_from(outcomes):
    """`votes` of outcomes 0, 1, 2, (n,) for both orders alike or (n, 2)."""
    outcomes = np.asarray(outcomes, dtype=np.int64)
    return np.eye(3, dtype=np.int64)[outcomes[:, None].repeat(2, axis=1) if outcomes.ndim == 1 else outcomes]


def agreement(votes, length=None, missing=0):
    n = len(votes)
    return calibration.agreement(votes, np.zeros(n) if length is None else length, np.zeros(n, dtype=bool), missing)


def result_of(votes, length=None, missing=0):
    n = len(votes)
    length = np.tile([-40.0, 55.0, -20.0, 30.0, 5.0], n)[:n] if length is None else length
    return statistics.summarise(votes, length, np.zeros(n, dtype=bool), missing, seed=0)


GOOD = agreement(votes_from([WIN] * 90 + [LOSS] * 10))


def conclude(result, labelled=GOOD, max_flip_rate=0.4):
    return conclusions.conclude(result, labelled, ("base", "dpo"), max_flip_rate)


def fair_votes(n, share):
    """Side 2 wins exactly `share`, in no order."""
    wins = np.arange(n) < round(n * share)
    return votes_from(np.where(np.random.default_rng(0).permutation(wins), WIN, LOSS))


def always_a(n):
    """Side 1 wins where it stands first, side 2 where it does."""
    return votes_from(np.tile([LOSS, WIN], (n, 1)))


# ---- against people


def test_accuracy_by_hand_with_ties_as_halves():
    votes = votes_from([[WIN, WIN], [WIN, TIE], [WIN, LOSS], [TIE, TIE], [LOSS, LOSS], [WIN, WIN]])
    got = agreement(votes)
    assert (got["accuracy"]["value"], got["accuracy"]["n"]) == (pytest.approx((3 + 2 * 0.5) / 6), 6)


def test_kappa_is_that_of_the_single_verdicts():
    rng = np.random.default_rng(0)
    outcomes = rng.choice(3, (50, 2), p=[0.2, 0.1, 0.7])
    people, judge = [], []
    for first, second in outcomes:
        people += ["B", "A"]  # the chosen answer is answer 2
        judge += [("A", "tie", "B")[first], ("B", "tie", "A")[second]]
    assert agreement(votes_from(outcomes))["cohen_kappa"] == pytest.approx(cohen_kappa_score(people, judge))


def test_kappa_of_always_a_is_zero_and_of_a_perfect_judge_one():
    assert agreement(always_a(30))["cohen_kappa"] == pytest.approx(0)
    assert agreement(votes_from([WIN] * 30))["cohen_kappa"] == pytest.approx(1)
    assert agreement(votes_from([]).reshape(-1, 2, 3))["cohen_kappa"] is None


def test_accuracy_by_length_splits_the_pairs_in_thirds():
    length = np.array([9.0, -9, 0, 8, -8, 1, 7])
    right = np.where(length > 5, WIN, LOSS)  # right where the chosen answer is the longer one
    parts = agreement(votes_from(right), length)["accuracy_by_length"]
    assert {name: (part["value"], part["n"]) for name, part in parts.items()} == {
        "rejected_longer": (0.0, 3),
        "similar": (pytest.approx(0.5), 2),
        "chosen_longer": (1.0, 2),
    }


def test_labelled_rows_become_comparisons_with_the_chosen_answer_as_side_2():
    rows = [
        {"pair_id": "t", "prompt": "Why?", "chosen": "yes", "rejected": "no"},
        {
            "pair_id": "m",
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
    ]
    text, messages = calibration.labelled_comparisons(rows, 5, seed=0)
    assert text == Comparison("t", [{"role": "user", "content": "Why?"}], "no", "yes", "rejected", "chosen")
    assert (messages.answer_1, messages.answer_2, messages.messages) == ("bad", "good", rows[1]["prompt"])


def test_the_draw_of_labelled_rows_depends_on_the_seed_alone():
    rows = [{"pair_id": str(i), "prompt": "p", "chosen": "c", "rejected": "r"} for i in range(100)]
    drawn = [[one.prompt_id for one in calibration.labelled_comparisons(rows, 10, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10


def test_self_comparisons_take_the_sides_in_turn():
    pairs = [Comparison(str(i), [], f"one{i}", f"two{i}", "base", "dpo") for i in range(3)]
    chosen = calibration.self_comparisons(pairs, 2)
    assert [(one.answer_1, one.answer_2, one.label_1) for one in chosen] == [
        ("one0", "one0", "base"),
        ("two1", "two1", "dpo"),
    ]


def test_self_agreement_shows_the_preferred_position():
    got = calibration.self_agreement(always_a(5), 0)
    assert (got["tie_rate"]["value"], got["first_position_rate"]["value"]) == (0.0, 1.0)
    assert calibration.self_agreement(votes_from([]).reshape(-1, 2, 3), 0)["tie_rate"]["value"] is None


# ---- conclusions


def test_a_fair_judge_names_the_winner_with_its_interval():
    got = conclude(result_of(fair_votes(400, 0.6)))
    assert got["winner"] == "dpo" and got["why"] == []
    assert got["conclusion"] == (
        "dpo beats base on 60.0% of the 400 decisive prompts (95% interval 55.1% to 64.7%), "
        "out of 400 prompts judged in both orders."
    )


def test_the_other_side_can_win_too():
    got = conclude(result_of(fair_votes(400, 0.4)))
    assert got["winner"] == "base"
    assert got["conclusion"].startswith("base beats dpo on 60.0% of the 400 decisive prompts (95% interval 55.1% to")


def test_a_judge_that_always_says_a_names_no_winner_and_is_found_out():
    got = conclude(result_of(always_a(300)), agreement(always_a(100)))
    assert got["winner"] is None
    assert "not better than chance" in got["conclusion"]
    assert any("100.0% of the prompts" in reason for reason in got["why"])
    assert any("shown first in 100.0%" in reason for reason in got["why"])
    # even if the labelled pairs were judged well, the answer is none
    got = conclude(result_of(always_a(300)))
    assert got["winner"] is None and "changes sides" in got["conclusion"]


def test_a_judge_of_length_alone_names_no_winner_though_its_raw_result_is_significant():
    rng = np.random.default_rng(1)
    length = rng.normal(0.54, 1.0, 2000) * 300
    votes = votes_from(np.where(rng.random(2000) < expit(0.75 * np.tanh(length / length.std())), WIN, LOSS))
    result = result_of(votes, length)
    assert result["orders_agree"]["win_rate"]["low"] > 0.5
    got = conclude(result)
    assert got["winner"] is None
    assert "length controlled" in got["conclusion"]


def test_no_labelled_pairs_no_winner():
    nobody = agreement(votes_from([]).reshape(-1, 2, 3))
    got = conclude(result_of(fair_votes(400, 0.9)), nobody)
    assert got["winner"] is None and "labelled by people" in got["conclusion"]


@pytest.mark.parametrize(("right", "believed"), [(50, False), (59, False), (61, True)])
def test_a_judge_must_beat_chance_on_labelled_pairs_by_its_interval(right, believed):
    """Wilson for 59 of 100 starts at 0.492, for 61 of 100 at 0.512."""
    labelled = agreement(votes_from([WIN] * right + [LOSS] * (100 - right)))
    got = conclude(result_of(fair_votes(400, 0.9)), labelled)
    assert (got["winner"] == "dpo") == believed


def test_the_allowed_flip_rate_is_the_callers():
    outcomes = [[WIN, WIN]] * 200 + [[WIN, LOSS]] * 100  # a third changes sides
    result = result_of(votes_from(outcomes))
    assert conclude(result, max_flip_rate=0.34)["winner"] == "dpo"
    got = conclude(result, max_flip_rate=0.33)
    assert got["winner"] is None and "33.3% of the prompts" in got["conclusion"]


def test_a_lead_that_may_be_chance_is_none():
    assert conclude(result_of(fair_votes(40, 0.55)))["winner"] is None
    # Wilson for 4 of 4 starts at 0.51, and yet the sign test gives p = 0.125
    got = conclude(result_of(votes_from([WIN] * 4)))
    assert got["winner"] is None and "may be chance" in got["conclusion"]


def test_no_decisive_prompt_is_said():
    got = conclude(result_of(votes_from([TIE] * 30)))
    assert got["winner"] is None and "no prompt is decisive" in got["conclusion"]


@pytest.mark.parametrize(("missing", "winner"), [(0, "dpo"), (38, "dpo"), (39, None)])
def test_a_winner_would_still_lead_if_all_that_is_missing_were_lost(missing, winner):
    """52 won and 13 lost: with 39 more lost it is even."""
    got = conclude(result_of(votes_from([WIN, WIN, WIN, LOSS, WIN] * 13), missing=missing))
    assert got["winner"] == winner
    mirrored = conclude(result_of(votes_from([LOSS, LOSS, LOSS, WIN, LOSS] * 13), missing=missing))
    assert mirrored["winner"] == ("base" if winner else None)


def test_where_all_is_won_by_the_longer_answer_length_may_be_the_reason():
    got = conclude(result_of(votes_from([WIN] * 100), np.full(100, 80.0) + np.arange(100)))
    assert got["winner"] is None and "not the longer one" in got["conclusion"]
    # won though shorter on most prompts: not by length
    got = conclude(result_of(votes_from([WIN] * 100), np.arange(100) - 60.0))
    assert got["winner"] == "dpo"


@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        (" First. ", "First."),
        ([{"role": "assistant", "content": "First.\n"}], "First."),
        (
            [
                {"role": "assistant", "content": "First."},
                {"role": "user", "content": "More?"},
                {"role": "assistant", "content": "Second."},
            ],
            "First.\n\nMore?\n\nSecond.",
        ),
    ],
)
def test_calibration_and_against_chosen_judge_the_same_text(chosen: Any, shown: str):
    row = {"pair_id": "1", "prompt": "Say it.", "chosen": chosen, "rejected": "No."}
    (labelled,) = calibration.labelled_comparisons([row], 1, seed=0)
    assert labelled.answer_2 == shown
    assert list(chosen_answers([row]).values()) == [shown]
