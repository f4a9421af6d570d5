"""Every sentence about a judge's verdicts: which cause it has, and that nothing else brings it about."""

import numpy as np
import pytest

from tandem.judge import calibration, conclusions, correction, statistics
from tandem.judge.conclusions import SENTENCES, WEAKNESS, Cause, Finding

LOSS, TIE, WIN = 0, 1, 2
LABELS = ("base", "dpo")


def votes(*groups):
    """`(number, first order, second order)` prompts, one after the other."""
    rows = [[first, second] for number, first, second in groups for _ in range(number)]
    return np.eye(3, dtype=np.int64)[np.array(rows, dtype=np.int64).reshape(-1, 2)]


def result(cast, missing=0, identical=0, length=None, answers=None, spoiled=None):
    n = len(cast)
    length = np.resize([-40.0, 55.0, -20.0, 30.0, 5.0], n) if length is None else length
    found = statistics.summarise(cast, length, np.arange(n) < identical, missing, seed=0, spoiled=spoiled)
    return found | {"non_answers": answers or {}}


def labelled(cast, missing=0, identical=0):
    n = len(cast)
    return calibration.agreement(cast, np.zeros(n), np.arange(n) < identical, missing)


GOOD = labelled(votes((90, WIN, WIN), (10, LOSS, LOSS)))
NOBODY = votes()
WON = votes((60, WIN, WIN), (10, LOSS, LOSS))
CLEAR = result(WON)
DPO_EMPTY = {"side_1": {"n": 70, "reasons": {}}, "side_2": {"n": 70, "reasons": {"empty": 5, "cut_off": 2}}}


def whole_only(whole):
    """Answers that are none on 7 of 70 prompts, and what the others say."""
    return CLEAR | {"non_answers": DPO_EMPTY, "whole_answers": whole}


LONGER = np.linspace(-1, 1, 400) + 0.9  # side 2 is the longer one on nearly all prompts, and wins where it is
BY_LENGTH = np.where(np.random.default_rng(1).random(400) < 1 / (1 + np.exp(-2.5 * LONGER)), WIN, LOSS)
WINS_BY_LENGTH = np.eye(3, dtype=np.int64)[np.stack([BY_LENGTH, BY_LENGTH], 1)]
LOST = [
    {"kind": "labelled", "status": "incomplete", "reason": "max_output_tokens", "count": 2},
    {"kind": "main", "status": "incomplete", "reason": "max_output_tokens", "count": 29},
    {"kind": "main", "status": "error", "reason": "timed out", "count": 1},
]


def by_people(share, low, high, n=100, drawn=True, why=None):
    people = {"value": share, "low": low, "high": high, "n": n} | ({} if why is None else {"why": why})
    return {"by_people": people, "drawn": drawn}


def told(found):
    return correction.findings(found, "dpo")


# cause: (result, labelled, besides), and what its sentence is
CASES = {
    Cause.NOT_TRIED: (CLEAR, labelled(NOBODY), [], "the judge was not tried on pairs labelled by people"),
    Cause.TRIED_WITHOUT_VERDICT: (CLEAR, labelled(NOBODY, missing=40), [], "was tried on 40 pairs labelled by people"),
    Cause.LABELLED_IDENTICAL: (
        CLEAR,
        labelled(votes((3, TIE, TIE)), missing=2, identical=3),
        [],
        "both answers are the same in all 3 labelled pairs with a verdict",
    ),
    Cause.NOT_BETTER_THAN_CHANCE: (
        CLEAR,
        labelled(votes((59, WIN, WIN), (41, LOSS, LOSS))),
        [],
        "on 100 pairs labelled by people the judge is right in 59.0% (95% interval 49.2% to 68.1%), which is not",
    ),
    Cause.FLIPS_ON_LABELLED: (
        CLEAR,
        labelled(votes((50, WIN, WIN), (50, WIN, LOSS))),
        [],
        "changes sides with the order of the answers on 50.0% of the labelled pairs, more than the 40.0% allowed",
    ),
    Cause.FLIPS_ON_PROMPTS: (
        result(votes((50, WIN, WIN), (50, WIN, LOSS))),
        GOOD,
        [],
        "on 50.0% of the prompts, more than the 40.0% allowed",
    ),
    Cause.NAMES_ONE_PLACE: (
        result(votes((10, WIN, WIN), (90, LOSS, WIN))),
        GOOD,
        [],
        "it names the answer shown first in 95.0% of its decisions",
    ),
    Cause.NO_PROMPT_JUDGED: (
        result(NOBODY, missing=30),
        GOOD,
        [],
        "on none of 30 prompts did the judge give a verdict in both orders",
    ),
    Cause.ALL_IDENTICAL: (
        result(votes((30, TIE, TIE)), identical=30),
        GOOD,
        [],
        "no prompt is decisive: both models gave the same answer on all of 30 prompts",
    ),
    Cause.NONE_DECISIVE: (
        result(votes((20, TIE, TIE), (10, WIN, TIE)), identical=5),
        GOOD,
        [],
        "no prompt is decisive: on none of 30 do both orders name the same answer",
    ),
    Cause.MAY_BE_CHANCE: (
        result(votes((12, WIN, WIN), (8, LOSS, LOSS))),
        GOOD,
        [],
        "dpo wins 12 and loses 8 of 20 decisive prompts (95% interval 38.7% to 78.1%, sign test p = 0.5), which may be",
    ),
    Cause.MISSING_MAY_TURN_IT: (
        result(WON, missing=50),
        GOOD,
        [],
        "dpo would not lead if it had lost the 50 prompts without a verdict",
    ),
    Cause.LENGTH_MAY_EXPLAIN: (
        result(WINS_BY_LENGTH, length=LONGER),
        GOOD,
        [],
        "the lead may be one of length alone",
    ),
    Cause.LENGTH_NOT_MODELLED: (
        result(votes((30, WIN, WIN)), length=np.arange(1.0, 31)),
        GOOD,
        [],
        "dpo leads, but not certainly where its answer is not the longer one (0 decisive prompts; length could not be",
    ),
    Cause.PEOPLE_DO_NOT_SAY_SO: (
        CLEAR | {"corrected": by_people(0.55, 0.46, 0.64)},
        GOOD,
        [],
        "corrected by the labels of people on 100 of the pairs dpo scores 55.0% (95% interval 46.0% to 64.0%), which",
    ),
    Cause.PEOPLE: (
        CLEAR,
        GOOD,
        told(by_people(0.8, 0.7, 0.9)),
        "Corrected by the labels of people on 100 of the pairs dpo scores 80.0% (95% interval 70.0% to 90.0%), a tie",
    ),
    Cause.TOO_FEW_LABELS: (
        CLEAR,
        GOOD,
        told(by_people(None, None, None, 7, why="people labelled 7 of the compared pairs; 30 are needed")),
        "The score is not corrected by the labels of people: people labelled 7 of the compared pairs; 30 are needed.",
    ),
    Cause.LABELS_NOT_DRAWN: (
        CLEAR,
        GOOD,
        told(by_people(0.8, 0.7, 0.9, drawn=False)),
        "the correction holds only if they were drawn at random",
    ),
    Cause.WON: (CLEAR, GOOD, [], "dpo beats base on 85.7% of the 70 decisive prompts (95% interval 75.7% to 92.1%)"),
    Cause.NON_ANSWERS: (
        whole_only(CLEAR["whole_answers"]),
        GOOD,
        [],
        "dpo gave no whole answer on 7 of 70 prompts (5 empty, 2 cut off by the limit of tokens)",
    ),
    Cause.WHOLE_ANSWERS: (
        whole_only(CLEAR["whole_answers"]),
        GOOD,
        [],
        "On the 70 prompts that both answered whole, dpo wins 60 and loses 10 (95% interval 75.7% to 92.1%)",
    ),
    Cause.WHOLE_NONE_DECISIVE: (
        whole_only({"n_prompts": 4, **statistics.count(np.zeros(4))}),
        GOOD,
        [],
        "On the 4 prompts that both answered whole, none of them is decisive",
    ),
    Cause.NO_WHOLE_ANSWERS: (
        whole_only({"n_prompts": 0, **statistics.count(np.zeros(0))}),
        GOOD,
        [],
        "No prompt with a verdict was answered whole by both",
    ),
    Cause.LOST_VERDICTS: (
        CLEAR,
        GOOD,
        conclusions.lost_verdicts(LOST, 104),
        "32 of 104 verdicts were lost: 31 incomplete (max_output_tokens); 1 error (timed out)",
    ),
}


def test_every_cause_has_its_sentence_and_its_case():
    assert set(SENTENCES) == set(Cause) == set(CASES)


@pytest.mark.parametrize("cause", Cause)
def test_the_cause_is_found_and_said(cause):
    found, judge, besides, said = CASES[cause]
    got = conclusions.conclude(found, judge, LABELS, 0.4, besides)
    assert cause in [row["cause"] for row in got["causes"]]
    sentences = [got["conclusion"], *got["why"]]
    assert any(said in sentence for sentence in sentences), sentences
    assert len(got["causes"]) == len(got["why"] or ["won"]) + len(got["warnings"])


@pytest.mark.parametrize("cause", Cause)
def test_a_clear_result_says_none_of_it(cause):
    got = conclusions.conclude(CLEAR, GOOD, LABELS, 0.4)
    assert [row["cause"] for row in got["causes"]] == [Cause.WON]
    if cause != Cause.WON:
        assert CASES[cause][3] not in got["conclusion"]


def test_the_numbers_of_a_sentence_are_in_the_summary():
    got = conclusions.conclude(CLEAR, GOOD, LABELS, 0.4)
    [record] = got["causes"]
    facts = {name: value for name, value in record.items() if name != "cause"}
    assert f"{Finding(Cause(record['cause']), facts).words}." == got["conclusion"]


def test_a_page_has_a_word_for_whatever_comes_first_against_a_judge():
    """`NAMES_ONE_PLACE` never stands alone."""
    first = set()
    for found, judge, _, _ in CASES.values():
        if against := conclusions.distrust(judge, found, 0.4):
            first.add(against[0].cause)
    assert first == set(WEAKNESS)


def test_many_reasons_are_told_in_short():
    rows = [{"kind": "main", "status": "error", "reason": f"number {n}", "count": 9 - n} for n in range(8)]
    [finding] = conclusions.lost_verdicts(rows, 100)
    assert finding.words.endswith("5 error (number 4); 9 for other reasons")
    assert conclusions.lost_verdicts([], 100) == []
