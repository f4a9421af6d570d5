"""The corrected score of a run: takes verdicts and labels to `judge.corrected`, and words the result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tandem.intervals import Array, Estimate, estimate
from tandem.judge import corrected, statistics, verdicts
from tandem.judge.conclusions import CHANCE, Cause, Finding
from tandem.judge.labels import is_first_part, read_labels
from tandem.judge.log import VerdictLog
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Comparison

ASSUMES = "the judge is right on these pairs as often as on the pairs labelled by people"


def correct(
    options: JudgeOptions,
    calls: Sequence[Call],
    log: VerdictLog,
    judged: tuple[Array, Array],
    labelled: tuple[Array, Array],
    accuracy: Estimate,
) -> dict[str, Any]:
    """Estimates of the mean score that people would give side 2, a tie as half a win.

    `by_people` is from labels on compared pairs and the verdicts, with the judge's weight λ in `weight`;
    `people_alone` is from these labels alone; `drawn` is whether they are on a random subset. `by_error_rates` is from
    how often the judge is right on labelled pairs. Pairs with the same answer on both sides count as ties.

    Args:
        calls: on the compared pairs
        judged: votes (n, 2, 3) on pairs judged in both orders, and bool (n,), which of them are identical
        labelled: the same for the labelled pairs
        accuracy: of the judge on the labelled pairs
    """
    comparisons = list({id(call.comparison): call.comparison for call in calls}.values())
    share = sum(not pair.identical for pair in comparisons) / len(comparisons)
    found: dict[str, Any] = {"by_people": None, "people_alone": None, "weight": None, "drawn": None}
    if options.human_labels is not None:
        found |= _by_people(options, comparisons, calls, log, share)
    rates = corrected.from_error_rates(_scores(*judged), _scores(*labelled))
    if rates["value"] is not None and accuracy["low"] <= CHANCE:
        why = "on the labelled pairs the judge is not better than chance"
        rates = estimate(None, None, None, rates["n"], why)
    return found | {"by_error_rates": _with_ties(rates, share) | {"assumes": ASSUMES}}


def _by_people(
    options: JudgeOptions, comparisons: Sequence[Comparison], calls: Iterable[Call], log: VerdictLog, share: float
) -> dict[str, Any]:
    differing = {pair.prompt_id for pair in comparisons if not pair.identical}
    labels = read_labels(str(options.human_labels), comparisons)
    labels = {key: score for key, score in labels.items() if key in differing}  # identical answers are ties anyway
    said = _said(calls, log)
    people = np.array(list(labels.values()))
    judge = np.array([said.get(key, CHANCE) for key in labels])
    others = np.array([said.get(key, CHANCE) for key in sorted(differing - labels.keys())])
    by_people, weight = corrected.from_labels(people, judge, others)
    return {
        "by_people": _with_ties(by_people, share),
        "people_alone": _with_ties(corrected.labels_alone(people), share),
        "weight": weight,
        "drawn": is_first_part(labels, comparisons, options.seed),
    }


def _scores(votes: Array, identical: Array) -> Array:
    return statistics.prompt_scores(votes[~identical])


def _said(calls: Iterable[Call], log: VerdictLog) -> dict[str, float]:
    """The judge's mean score of side 2 by prompt, from all verdicts that there are, be it in one order only."""
    scores: dict[str, list[float]] = {}
    for call in calls:
        if record := log.verdict(call):
            score = verdicts.vote(record["verdict"], call.order) / 2
            scores.setdefault(call.comparison.prompt_id, []).append(score)
    return {key: sum(each) / len(each) for key, each in scores.items()}


def _with_ties(found: Estimate, share: float) -> Estimate:
    """An estimate over the pairs that differ, a `share` of all, as one over all pairs: the others are ties."""
    mixed = {
        end: None if found[end] is None else CHANCE + share * (found[end] - CHANCE) for end in ("value", "low", "high")
    }
    return found | mixed


def findings(found: Mapping[str, Any], label_2: str) -> list[Finding]:
    """What the conclusion says of the corrected score."""
    people = found["by_people"]
    if people is None:
        return []
    if people["value"] is None:
        return [Finding(Cause.TOO_FEW_LABELS, {"why": people["why"]})]
    facts = {"label": label_2, "n": people["n"], "share": people["value"]}
    told = [Finding(Cause.PEOPLE, facts | {"low": people["low"], "high": people["high"]})]
    return told if found["drawn"] else [*told, Finding(Cause.LABELS_NOT_DRAWN)]
