"""The contents of judge_summary.json and winners.json, from the verdicts."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tandem.intervals import Array
from tandem.judge import calibration, conclusions, correction, statistics, verdicts
from tandem.judge.log import VerdictLog, lost
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import PROMPT_VERSION, Call, Comparison, Judge, Kind, text_digest
from tandem.judge.verdicts import ORDERS

Plan = dict[Kind, list[Call]]


def summarise(
    options: JudgeOptions, judge: Judge, plan: Plan, log: VerdictLog, asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What judge_summary.json holds; `asked` is how the server was asked (`Endpoint.state`)."""
    votes = {kind: votes_of(calls, log) for kind, calls in plan.items()}
    labelled = calibration.agreement(*votes["labelled"][:4])
    main, length, identical, missing, spoiled = votes["main"]
    result = statistics.summarise(main, length, identical, missing, seed=options.seed, spoiled=spoiled)
    result["non_answers"] = non_answers(plan["main"])
    trusted = votes["labelled"][0], votes["labelled"][2]
    result["corrected"] = correction.correct(
        options, plan["main"], log, (main, identical), trusted, labelled["accuracy"]
    )
    first = plan["main"][0].comparison
    gone = lost_verdicts(plan, log)
    besides = [
        *correction.findings(result["corrected"], first.label_2),
        *conclusions.lost_verdicts(gone, sum(map(len, plan.values()))),
    ]
    labels = (first.label_1, first.label_2)
    return {
        **conclusions.conclude(result, labelled, labels, options.max_flip_rate, besides),
        "judge": {
            "model": judge.model,
            "base_url": judge.base_url,
            "prompt_version": PROMPT_VERSION,
            "schema_enforced": judge.schema_enforced,
            "sampling": judge.sampling,
            "samples": options.samples,
            "form": asked["form"] if asked else None,
            "left_out": asked["left_out"] if asked else [],
        },
        "labels": {"side_1": first.label_1, "side_2": first.label_2},
        "calibration": {
            "labelled": labelled,
            "self_vs_self": calibration.self_agreement(votes["self"][0], votes["self"][3]),
            "max_flip_rate": options.max_flip_rate,
        },
        "result": result,
        "accounting": {kind: _accounting(calls, log) for kind, calls in plan.items()},
        "lost": gone,
        "tokens_of_verdicts": _tokens_of_verdicts(plan, log),
    }


def lost_verdicts(plan: Plan, log: VerdictLog) -> list[dict[str, Any]]:
    """Verdicts that were asked for and lost: rows of `kind`, `status`, `reason` and `count`."""
    return [
        {"kind": kind, "status": status, "reason": reason, "count": count}
        for kind, calls in plan.items()
        for status, reason, count in lost(calls, log)
    ]


def winners(calls: Iterable[Call], log: VerdictLog) -> list[dict[str, Any]]:
    """A row for each prompt: `prompt_id`, `winner_model_vs_<side 1>`, `calls` and `answers`.

    The winner is `model` (side 2), the label of side 1 or `tie`, if both orders agree; else `disagree` or `unjudged`.
    `calls` are the keys of the prompt's verdicts in verdicts.jsonl, and `answers` the digests (`text_digest`) of both
    sides.
    """
    asked: dict[int, list[Call]] = {}
    for call in calls:
        asked.setdefault(id(call.comparison), []).append(call)
    rows = []
    for group in asked.values():
        comparison = group[0].comparison
        end = verdicts.outcome([record for call in group if (record := log.verdict(call))])
        winner = {"won": "model", "lost": comparison.label_1}.get(end, end)
        rows.append(
            {
                "prompt_id": comparison.prompt_id,
                f"winner_model_vs_{comparison.label_1}": winner,
                "calls": [call.key for call in group],
                "answers": [text_digest(comparison.answer_1), text_digest(comparison.answer_2)],
            }
        )
    return rows


def non_answers(calls: Iterable[Call]) -> dict[str, Any]:
    """For each side, how many answers it has, and how many of them are none, by reason."""
    comparisons = list({id(call.comparison): call.comparison for call in calls}.values())
    found = {}
    for side in ("1", "2"):
        reasons = collections.Counter(getattr(each, f"non_answer_{side}") for each in comparisons)
        found[f"side_{side}"] = {
            "n": len(comparisons),
            "reasons": {reason: count for reason, count in reasons.most_common() if reason is not None},
        }
    return found


def votes_of(calls: Iterable[Call], log: VerdictLog) -> tuple[Array, Array, Array, int, Array]:
    """(n, 2, 3) votes, (n,) length difference in characters, (n,) identical, prompts left out, (n, 2) no whole answer.

    A prompt without a verdict in one of the orders is left out: one order alone has the judge's position bias in it.
    """
    cast = votes_cast(calls, log)
    scored = [comparison for comparison, votes in cast if votes.sum(1).all()]
    return (
        np.array([votes for _, votes in cast if votes.sum(1).all()], dtype=np.int64).reshape(-1, 2, 3),
        np.array([len(one.answer_2) - len(one.answer_1) for one in scored], dtype=np.float64),
        np.array([one.identical for one in scored], dtype=bool),
        len(cast) - len(scored),
        np.array([[one.non_answer_1 is not None, one.non_answer_2 is not None] for one in scored], dtype=bool).reshape(
            -1, 2
        ),
    )


def votes_cast(calls: Iterable[Call], log: VerdictLog) -> list[tuple[Comparison, Array]]:
    """Each comparison with its votes, (2 orders, 3), in the order of the calls."""
    found: dict[int, tuple[Comparison, Array]] = {}
    for call in calls:
        _, votes = found.setdefault(id(call.comparison), (call.comparison, np.zeros((2, 3), dtype=np.int64)))
        if record := log.verdict(call):
            votes[ORDERS.index(call.order), verdicts.vote(record["verdict"], call.order)] += 1
    return list(found.values())


def _accounting(calls: Sequence[Call], log: VerdictLog) -> dict[str, int]:
    """How many calls ended in which way; the parts add up to `verdicts`."""
    ends = collections.Counter("identical" if call.free else log.status(call) for call in calls)
    kinds = ("ok", "identical", "refusal", "malformed", "incomplete", "error", "not_asked")
    return {"verdicts": len(calls)} | {kind: ends[kind] for kind in kinds}


def _tokens_of_verdicts(plan: Plan, log: VerdictLog) -> dict[str, int]:
    records = [record for calls in plan.values() for call in calls if (record := log.verdict(call))]
    return {name: sum(record[name] for record in records) for name in ("input_tokens", "output_tokens")}
