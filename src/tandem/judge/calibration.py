"""How far the judge can be trusted, measured in the same run, and what may be concluded from its verdicts."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.formats import as_messages
from tandem.data.held_out import judged_text
from tandem.intervals import LEVEL, Array, Estimate, estimate, length_terciles, wilson
from tandem.judge import statistics
from tandem.judge.requests import Comparison

CHANCE = 0.5
SIGNIFICANCE = 1 - LEVEL


def labelled_comparisons(rows: Sequence[Mapping[str, Any]], limit: int, seed: int) -> list[Comparison]:
    """Canonical rows as comparisons whose side 2 is the answer that people chose; `limit` of them, drawn by `seed`."""
    drawn = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    return [_labelled(rows[index]) for index in sorted(drawn)]


def _labelled(row: Mapping[str, Any]) -> Comparison:
    rejected, chosen = (judged_text(row[side]) for side in ("rejected", "chosen"))
    return Comparison(row["pair_id"], as_messages(row["prompt"]), rejected, chosen, "rejected", "chosen")


def self_comparisons(comparisons: Sequence[Comparison], limit: int) -> list[Comparison]:
    """The first `limit` prompts with one answer on both sides, the sides taking turns."""
    chosen = []
    for index, pair in enumerate(comparisons[:limit]):
        answer, label = ((pair.answer_1, pair.label_1), (pair.answer_2, pair.label_2))[index % 2]
        chosen.append(Comparison(pair.prompt_id, pair.messages, answer, answer, label, label))
    return chosen


def agreement(votes: Array, length_difference: Array, identical: Array, missing: int) -> dict[str, Any]:
    """The judge against people, on pairs whose side 2 is the one they chose.

    Accuracy: a pair is right if the judge's mean over both orders favours the chosen answer, and half right at a tie;
    Wilson's interval over pairs (a little too long where there are ties, which is the safe side). Cohen's κ: every
    verdict (A, B, tie) against the place where the chosen answer stood; no interval, since calls are not independent.

    Args:
        votes: int (n, 2, 3)
        length_difference: (n,) characters of chosen less those of rejected
        identical: bool (n,), left out: a label on equal answers is noise
        missing: pairs without a verdict in one order or both
    """
    votes, length_difference = votes[~identical], length_difference[~identical]
    right = (statistics.mean_outcomes(votes) + 1) / 2
    return {
        "n_missing": missing,
        "accuracy": _share(right),
        "cohen_kappa": _kappa(votes),
        "accuracy_by_length": {name: _share(right[part]) for name, part in length_terciles(length_difference).items()},
        "first_position_rate": statistics.first_position_rate(votes),
        "order_flip_rate": statistics.flip_rate(votes),
    }


def _share(right: Array) -> Estimate:
    return wilson(float(right.sum()), len(right), "no pair was judged in both orders")


def _kappa(votes: Array) -> float | None:
    if not len(votes):
        return None
    from sklearn.metrics import cohen_kappa_score

    # Confusion of (place of the chosen answer, verdict) as weighted pairs. The chosen one, side 2, stands as B in the
    # first order and as A in the second, so that a win is B there and A here.
    people, judge, weights = [], [], []
    for order, (chosen, rejected) in enumerate((("B", "A"), ("A", "B"))):
        for outcome, verdict in enumerate((rejected, "tie", chosen)):
            people.append(chosen)
            judge.append(verdict)
            weights.append(int(votes[:, order, outcome].sum()))
    return float(cohen_kappa_score(people, judge, labels=["A", "B", "tie"], sample_weight=weights))


def self_agreement(votes: Array, missing: int) -> dict[str, Any]:
    """The judge on an answer against itself: whatever it prefers, it prefers a position."""
    calls = int(votes.sum())
    ties = int(votes[..., 1].sum())
    return {
        "n_prompts": len(votes),
        "n_missing": missing,
        "tie_rate": estimate(
            ties / calls if calls else None, None, None, calls, None if calls else "no answer was judged against itself"
        ),
        "first_position_rate": statistics.first_position_rate(votes),
    }


def untried(labelled: Mapping[str, Any]) -> str:
    """Why the judge has no accuracy on labelled pairs: nobody asked, or no pair got its verdicts."""
    if labelled["n_missing"]:
        return (
            f"the judge was tried on {labelled['n_missing']} pairs labelled by people and gave on none of them a "
            "verdict in both orders"
        )
    return "the judge was not tried on pairs labelled by people"


def distrust(labelled: Mapping[str, Any], result: Mapping[str, Any], max_flip_rate: float) -> list[str]:
    """Why this judge's verdicts must not name a winner; empty if they may."""
    reasons = []
    accuracy = labelled["accuracy"]
    if accuracy["value"] is None:
        reasons.append(f"{untried(labelled)}, so nothing says that it can judge")
    elif accuracy["low"] <= CHANCE:
        reasons.append(
            f"on {accuracy['n']} pairs labelled by people the judge is right in {_percent(accuracy['value'])} "
            f"({_interval(accuracy)}), which is not better than chance"
        )
    for name, rate in (("labelled pairs", labelled["order_flip_rate"]), ("prompts", result["order_flip_rate"])):
        if rate["value"] is not None and rate["value"] > max_flip_rate:
            reasons.append(
                f"the judge changes sides with the order of the answers on {_percent(rate['value'])} of the {name}, "
                f"more than the {_percent(max_flip_rate)} allowed"
            )
    first = result["first_position_rate"]["value"]
    if reasons and first is not None and abs(first - CHANCE) > 0.25:
        place = "first" if first > CHANCE else "second"
        reasons.append(f"it names the answer shown {place} in {_percent(max(first, 1 - first))} of its decisions")
    return reasons


def doubts(result: Mapping[str, Any], label_1: str, label_2: str) -> list[str]:
    """Why the verdicts, taken at their word, show no winner; empty if they show one.

    A winner leads on the prompts where both orders agree (Wilson interval and sign test), would still lead if it had
    lost every prompt that is missing, and leads where length cannot be the reason.
    """
    counts = result["orders_agree"]
    rate = counts["win_rate"]
    if rate["value"] is None:
        return [f"no prompt is decisive: on none of {result['n_scored']} do both orders name the same answer"]
    leads = rate["value"] > CHANCE
    leader = label_2 if leads else label_1
    if rate["low"] <= CHANCE <= rate["high"] or counts["sign_test_p"] >= SIGNIFICANCE:
        return [
            f"{label_2} wins {counts['wins']} and loses {counts['losses']} of {rate['n']} decisive prompts "
            f"({_interval(rate)}, sign test p = {counts['sign_test_p']:.2g}), which may be chance"
        ]
    reasons = []
    worst = result["bounds"]["missing_as_losses" if leads else "missing_as_wins"]["win_rate"]["value"]
    if (worst > CHANCE) != leads or worst == CHANCE:
        reasons.append(f"{leader} would not lead if it had lost the {result['n_missing']} prompts without a verdict")
    reasons += _length_doubts(result, leader, leads)
    return reasons


def _length_doubts(result: Mapping[str, Any], leader: str, leads: bool) -> list[str]:
    default = result["decided_by_non_answers"]["win_rate"]
    if default["value"] is not None and (default["low"] > CHANCE if leads else default["high"] < CHANCE):
        return []  # the lead is there without a prompt on which two answers could differ in length
    controlled = result["length_controlled"]
    if controlled["value"] is None:
        # No model to take length out with: look where the leader has no advantage in length
        fair = result["when_not_longer"]["side_2" if leads else "side_1"]
        if fair["value"] is None or fair["low"] <= CHANCE:
            return [
                f"{leader} leads, but not certainly where its answer is not the longer one "
                f"({fair['n']} decisive prompts; length could not be modelled: {controlled['why']})"
            ]
        return []
    certain = controlled["low"] > CHANCE if leads else controlled["high"] < CHANCE
    if certain:
        return []
    return [
        f"with length controlled {leader} wins {_percent(controlled['value'] if leads else 1 - controlled['value'])} "
        f"({_interval(controlled if leads else _other_side(controlled))}): the lead may be one of length alone"
    ]


def conclude(
    result: Mapping[str, Any], labelled: Mapping[str, Any], label_1: str, label_2: str, max_flip_rate: float
) -> dict[str, Any]:
    """`winner` (a label or None), `conclusion`, `why` (reasons against one), `warnings` (its last part)."""
    told = _conclusion(result, labelled, label_1, label_2, max_flip_rate)
    warnings = spoiled(result, label_1, label_2)
    return told | {"conclusion": " ".join([told["conclusion"], *warnings]), "warnings": warnings}


REASONS = {
    "empty": "empty",
    "cut_off": "cut off by the limit of tokens",
    "unclosed_think": "nothing but reasoning",
    "filtered": "refused by the server",
    "not_text": "not text",
}
MANY = 0.05  # share of answers that are none, above which it is told with the conclusion


def spoiled(result: Mapping[str, Any], label_1: str, label_2: str) -> list[str]:
    """A sentence for each side more than 5% of whose answers are none, and what the rest of the prompts say."""
    sentences = []
    for side, label in (("side_2", label_2), ("side_1", label_1)):
        found = result.get("non_answers", {}).get(side)
        count = sum(found["reasons"].values()) if found else 0
        if found and count > MANY * found["n"]:
            reasons = ", ".join(f"{number} {REASONS.get(name, name)}" for name, number in found["reasons"].items())
            sentences.append(f"{label} gave no whole answer on {count} of {found['n']} prompts ({reasons}).")
    if sentences:
        whole = result["whole_answers"]
        rate = whole["win_rate"]
        share = (
            "none of them is decisive"
            if rate["value"] is None
            else (f"{label_2} wins {whole['wins']} and loses {whole['losses']} ({_interval(rate)})")
        )
        sentences.append(f"On the {whole['n_prompts']} prompts that both answered whole, {share}.")
    return sentences


def _conclusion(
    result: Mapping[str, Any], labelled: Mapping[str, Any], label_1: str, label_2: str, max_flip_rate: float
) -> dict[str, Any]:
    sides = f"{label_2} and {label_1}"
    if why := distrust(labelled, result, max_flip_rate):
        return {"winner": None, "conclusion": f"No winner is named between {sides}: {why[0]}.", "why": why}
    if why := doubts(result, label_1, label_2):
        return {"winner": None, "conclusion": f"No winner between {sides}: {why[0]}.", "why": why}
    rate = result["orders_agree"]["win_rate"]
    winner, loser = label_2, label_1
    if rate["value"] < CHANCE:
        winner, loser, rate = label_1, label_2, _other_side(rate)
    conclusion = (
        f"{winner} beats {loser} on {_percent(rate['value'])} of the {rate['n']} decisive prompts ({_interval(rate)}), "
        f"out of {result['n_scored']} prompts judged in both orders."
    )
    return {"winner": winner, "conclusion": conclusion, "why": []}


def _other_side(share: Mapping[str, Any]) -> Estimate:
    return estimate(1 - share["value"], 1 - share["high"], 1 - share["low"], share["n"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _interval(share: Mapping[str, Any]) -> str:
    return f"95% interval {_percent(share['low'])} to {_percent(share['high'])}"
