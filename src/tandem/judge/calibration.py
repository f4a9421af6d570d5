"""How far the judge can be trusted, measured in the run that it judges."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.formats import as_messages
from tandem.data.messages import answer_text
from tandem.intervals import Array, Estimate, estimate, length_terciles, wilson
from tandem.judge import statistics
from tandem.judge.requests import Comparison


def labelled_comparisons(rows: Sequence[Mapping[str, Any]], limit: int, seed: int) -> list[Comparison]:
    """At most `limit` canonical rows, drawn by `seed`, as comparisons whose side 2 is the answer that people chose."""
    drawn = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    return [_labelled(rows[index]) for index in sorted(drawn)]


def _labelled(row: Mapping[str, Any]) -> Comparison:
    rejected, chosen = (answer_text(row[side]).strip() for side in ("rejected", "chosen"))
    return Comparison(row["pair_id"], as_messages(row["prompt"]), rejected, chosen, "rejected", "chosen")


def self_comparisons(comparisons: Sequence[Comparison], limit: int) -> list[Comparison]:
    """The first `limit` prompts with one answer shown as both: in turn that of side 1 and that of side 2."""
    chosen = []
    for index, pair in enumerate(comparisons[:limit]):
        answer, label = ((pair.answer_1, pair.label_1), (pair.answer_2, pair.label_2))[index % 2]
        chosen.append(Comparison(pair.prompt_id, pair.messages, answer, answer, label, label))
    return chosen


def agreement(votes: Array, length_difference: Array, identical: Array, missing: int) -> dict[str, Any]:
    """How well the judge agrees with people, on pairs whose side 2 is the answer that people chose.

    Accuracy: the judge is right on a pair if its mean over both orders favours the chosen answer, and half right at a
    tie. Wilson's interval over pairs; with ties it is a little too long, which errs on the safe side. Cohen's κ: every
    verdict (A, B, tie) against the position of the chosen answer; no interval, since calls are not independent.

    Args:
        votes: int (n, 2, 3)
        length_difference: (n,) characters of chosen minus those of rejected
        identical: bool (n,), pairs that are left out: a label on equal answers is noise
        missing: pairs without a verdict in one order or both
    """
    same = int(identical.sum())
    votes, length_difference = votes[~identical], length_difference[~identical]
    right = (statistics.mean_outcomes(votes) + 1) / 2
    return {
        "n_missing": missing,
        "n_identical": same,
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

    # The confusion matrix of (position of the chosen answer, verdict) as weighted pairs. The chosen answer, side 2, is
    # B in the first order and A in the second.
    people, judge, weights = [], [], []
    for order, (chosen, rejected) in enumerate((("B", "A"), ("A", "B"))):
        for outcome, verdict in enumerate((rejected, "tie", chosen)):
            people.append(chosen)
            judge.append(verdict)
            weights.append(int(votes[:, order, outcome].sum()))
    return float(cohen_kappa_score(people, judge, labels=["A", "B", "tie"], sample_weight=weights))


def self_agreement(votes: Array, missing: int) -> dict[str, Any]:
    """How the judge decides between an answer and itself: any preference is one for a position."""
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
