"""How far the judge can be trusted, measured in the same run."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.formats import as_messages
from tandem.data.messages import answer_text
from tandem.intervals import Array, Estimate, estimate, length_terciles, wilson
from tandem.judge import statistics
from tandem.judge.requests import Comparison


def labelled_comparisons(rows: Sequence[Mapping[str, Any]], limit: int, seed: int) -> list[Comparison]:
    """Canonical rows as comparisons whose side 2 is the answer that people chose; `limit` of them, drawn by `seed`."""
    drawn = random.Random(seed).sample(range(len(rows)), min(limit, len(rows)))
    return [_labelled(rows[index]) for index in sorted(drawn)]


def _labelled(row: Mapping[str, Any]) -> Comparison:
    rejected, chosen = (answer_text(row[side]).strip() for side in ("rejected", "chosen"))
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
