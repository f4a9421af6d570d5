"""Makes preference pairs of scored answers, with their provenance and a report on the prompts without a pair."""

import functools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tandem import ranks
from tandem.data import non_answers, select
from tandem.data.check import run_check
from tandem.data.messages import extras_of
from tandem.data.near import SIMILAR, jaccard, shingles
from tandem.data.options import CheckOptions, DataOptions
from tandem.data.shortcuts import pick_longer
from tandem.data.sources import load_pairs
from tandem.errors import UserError
from tandem.options.model import TextOptions
from tandem.rounds.names import PAIRS, PAIRS_REPORT
from tandem.rounds.options import PairOptions
from tandem.rounds.records import Record, by_prompt, read_records
from tandem.runs import locked, write_atomic, write_json


def make_pairs(options: PairOptions) -> dict[str, Any]:
    """Write the pairs and their report to `output_dir`, and run the data check on them; returns the report.

    Raises:
        UserError: the scores cannot be read, no prompt gives a pair, or the data check fails.
    """
    ranks.refuse_several("make_pairs")
    records = read_records(options.scores, scored=True)
    if any(record.get("held_out") for record in records):
        raise UserError(f"--scores {options.scores}: has answers to held-out prompts, which nothing may be trained on")
    groups = by_prompt(records)
    rows: list[dict[str, Any]] = []
    without: Counter[str] = Counter()
    for key, answers in groups.items():
        pairs, why = _pairs_of(answers, options, f"{options.pair_seed} {key}")
        rows += [_row(answers[chosen], answers[rejected], options.round) for chosen, rejected in pairs]
        if why:
            without[why] += 1
    report = _report(groups, rows, without)
    folder = Path(options.output_dir)
    with locked(folder):
        file = folder / PAIRS
        file.unlink(missing_ok=True)  # pairs of an earlier run must not be trained on if this one fails
        write_json(folder / PAIRS_REPORT, report)
        if not rows:
            told = ", ".join(f"{why} {count}" for why, count in without.most_common())
            raise UserError(f"{options.scores}: no pair can be made of its {len(groups)} prompts: {told}")
        write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        check = CheckOptions(report=str(folder / "data_report.json"), fail_on=options.fail_on)
        pairs_read = load_pairs(DataOptions(dataset_name=str(file)), "train")
        run_check(check, TextOptions(), {"train": pairs_read})
    return report


def _pairs_of(answers: Sequence[Record], options: PairOptions, seed: str) -> tuple[list[select.Pair], str | None]:
    """Index pairs into `answers`, or why there are none. Equal answers count once, with the mean of their scores."""
    alike: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        alike.setdefault(answer["text"].strip(), []).append(index)
    places = [indices[0] for indices in alike.values()]
    scores = [_mean_score([answers[index] for index in indices]) for indices in alike.values()]
    tokens: list[Any] = [answers[index].get("n_tokens") for index in places]
    lengths: list[int] = [len(text) for text in alike] if None in tokens else tokens

    @functools.cache
    def words(index: int) -> np.ndarray:
        return shingles(answers[places[index]]["text"])

    def similar(one: int, other: int) -> bool:
        return not options.keep_near_duplicates and jaccard(words(one), words(other)) >= SIMILAR

    found, why = select.select(scores, lengths, options.selection, seed, similar)
    return [(places[chosen], places[rejected]) for chosen, rejected in found], why


def _mean_score(answers: Sequence[Record]) -> float | None:
    """The mean score of equal answers, over those that are whole and have a score; None if none does."""
    scores = [answer["score"] for answer in answers if not non_answers.non_answer(answer)]
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if known else None


def _row(chosen: Record, rejected: Record, number: int) -> dict[str, Any]:
    """A pair in the format `messages`, with its provenance."""
    origin = ("label", "model", "adapter", "draw", "seed", "score", "scorer", "scores", "n_tokens", "sampling")
    return {
        "prompt": chosen["messages"],
        **extras_of(chosen["messages"]),
        "chosen": [{"role": "assistant", "content": chosen["text"].strip()}],
        "rejected": [{"role": "assistant", "content": rejected["text"].strip()}],
        "provenance": {
            "round": number,
            "chosen": {name: chosen[name] for name in origin if name in chosen},
            "rejected": {name: rejected[name] for name in origin if name in rejected},
        },
    }


def _report(groups: dict[str, list[Record]], rows: Sequence[dict[str, Any]], without: Counter[str]) -> dict[str, Any]:
    answers = [answer for group in groups.values() for answer in group]
    reasons = Counter(answer.get("non_answer") or non_answers.non_answer(answer) for answer in answers)
    sides = [(row["provenance"]["chosen"], row["provenance"]["rejected"]) for row in rows]
    margins = [chosen["score"] - rejected["score"] for chosen, rejected in sides]
    characters = np.array([[len(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows])
    return {
        "prompts": len(groups),
        "answers": len(answers),
        "answers_without_score": sum(answer["score"] is None for answer in answers),
        "non_answers": {why: count for why, count in sorted(reasons.items(), key=str) if why},
        "pairs": len(rows),
        "prompts_with_pairs": len(groups) - without.total(),
        "prompts_without_pairs": {why: without[why] for why in select.REASONS if without[why]},
        "margin": _spread(margins),
        "characters": {
            "chosen": _spread(characters[:, 0]) if rows else None,
            "rejected": _spread(characters[:, 1]) if rows else None,
            "chosen_longer": pick_longer(characters) if rows else None,
        },
        "tokens": {
            name: _spread([side[index]["n_tokens"] for side in sides if side[index].get("n_tokens") is not None])
            for index, name in enumerate(("chosen", "rejected"))
        },
        "labels": {
            name: dict(Counter(side[index]["label"] for side in sides).most_common())
            for index, name in enumerate(("chosen", "rejected"))
        },
    }


def _spread(values: Any) -> dict[str, float] | None:
    """Mean, quartiles, least and most of `values`; None where there are none."""
    if not len(values):
        return None
    quartiles = np.quantile(np.asarray(values, float), [0, 0.25, 0.5, 0.75, 1])
    names = ("least", "lower_quartile", "median", "upper_quartile", "most")
    return {"mean": float(np.mean(values))} | dict(zip(names, map(float, quartiles), strict=True))


def to_markdown(report: dict[str, Any]) -> str:
    """A few lines on how many prompts gave a pair, and on the pairs' margins and lengths."""
    reasons = [*report["prompts_without_pairs"].items()]
    lines = [
        f"{report['pairs']} pairs of {report['prompts_with_pairs']} of {report['prompts']} prompts "
        f"({report['answers']} answers)"
    ]
    lines += [f"without a pair: {', '.join(f'{why} {count}' for why, count in reasons)}"] if reasons else []
    if report["non_answers"]:
        told = ", ".join(f"{why} {count}" for why, count in report["non_answers"].items())
        lines.append(f"answers that are none: {told}")
    if report["pairs"]:
        margin, longer = report["margin"], report["characters"]["chosen_longer"]
        lines.append(f"margin: median {margin['median']:.3g}, from {margin['least']:.3g} to {margin['most']:.3g}")
        lines.append(
            f"chosen is longer in {longer['value']:.0%} (95% interval {longer['low']:.0%} to {longer['high']:.0%})"
        )
    return "\n".join(lines)
