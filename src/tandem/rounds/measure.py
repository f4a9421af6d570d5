"""Measures the rounds on the held-out prompts, against round 0."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tandem.answers.refusals import is_refusal
from tandem.data.non_answers import spoken
from tandem.errors import UserError
from tandem.intervals import Estimate, bootstrap, estimate, mean, wilson
from tandem.markdown_table import markdown_table
from tandem.report.page import rounds_page
from tandem.report.rounds import rounds_table
from tandem.rounds.divergence import divergence
from tandem.rounds.names import ROUNDS_FILE, SCORES
from tandem.rounds.options import RoundsOptions
from tandem.rounds.records import Record, read_records
from tandem.runs import write_atomic, write_json

_FOLDER = re.compile(r"round_(\d+)")
_NONE_IN_BOTH = "no prompt has a score in both rounds"


def measure(options: RoundsOptions) -> dict[str, Any]:
    """Read round_<r>/held_out/scores.jsonl of each round and write rounds.json, rounds.md and rounds.html.

    Raises:
        UserError: round 0 is missing, or a round answers other prompts than round 0.
    """
    folder = Path(options.run_dir)
    rounds = _read(folder)
    rows = [_row(number, rounds[number], rounds[0], options) for number in sorted(rounds)]
    for row in rows:
        own = folder / f"round_{row['round']}" / "held_out"
        _add_judged(row, own / "judge_summary.json")
        row["kl"] = divergence(own, rounds[row["round"]], rounds[0], options) if row["round"] else None
    best = _best(rows, rounds, options)
    results = {"rounds": rows, "best_round": best, "stop": rows[-1]["stop"], "warnings": _over_optimised(rows)}
    write_json(folder / ROUNDS_FILE, results)
    write_atomic(folder / "rounds.md", to_markdown(results) + "\n")
    write_atomic(folder / "rounds.html", rounds_page(folder, results).encode(errors="replace"))
    return results


def _read(folder: Path) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {}
    for each in sorted(folder.glob("round_*")):
        file, named = each / "held_out" / SCORES, _FOLDER.fullmatch(each.name)
        if named and file.is_file():
            found[int(named[1])] = read_records(file, scored=True)
    if 0 not in found:
        raise UserError(f"{folder}: has no round_0/held_out/{SCORES}, which the rounds are measured against")
    for number, records in found.items():
        own, first = ([record["prompt_id"] for record in each] for each in (records, found[0]))
        if sorted(own) != sorted(first):
            raise UserError(f"{folder / f'round_{number}'}: its held-out answers are not to the prompts of round 0")
    return found


def _by_prompt(records: Sequence[Record], name: str | None, of_none: float | None) -> dict[str, float]:
    """The mean score of each prompt, by the scorer `name`, or the one that ranks if None.

    An answer that is none (empty, cut off) has the score `of_none`; where that is None, it is left out.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        score = record["score"] if name is None else record.get("scores", {}).get(name)
        if record.get("non_answer") is not None:
            score = of_none
        if score is not None:
            values.setdefault(record["prompt_id"], []).append(score)
    return {key: fmean(own) for key, own in values.items()}


def _row(number: int, records: Sequence[Record], base: Sequence[Record], options: RoundsOptions) -> dict[str, Any]:
    ranked = next((record["scorer"] for record in records if record.get("scorer")), None)
    names = sorted({name for record in records for name in record.get("scores", {})} - {ranked})
    lengths = [record["n_tokens"] for record in records if record.get("n_tokens") is not None]
    said = [spoken(record["text"]) for record in records]
    return {
        "round": number,
        "answers": len(records),
        "scorer": ranked,
        **_by_scorer(records, base, None, options),
        "others": {name: _by_scorer(records, base, name, options) for name in names},
        "mean_tokens": fmean(lengths) if lengths else None,
        "mean_characters": fmean(map(len, said)),
        "distinct_bigrams": distinct_bigrams(said),
        "refusals": fmean(map(is_refusal, said)),
        "non_answers": fmean(record.get("non_answer") is not None for record in records),
    }


def _add_judged(row: dict[str, Any], file: Path) -> None:
    """Add to a judge's numbers what its summary says beyond single verdicts, where it compared the round with round 0.

    Raises:
        UserError: the summary is damaged.
    """
    if not row["round"] or not file.is_file():
        return
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        name = f"judge:{summary['judge']['model']}"
        found = {what: summary["result"][what] for what in ("length_controlled", "order_flip_rate")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}); score that round's held-out answers anew") from error
    own = row if row["scorer"] == name else row["others"].get(name)
    if own is not None:
        own |= found


def _by_scorer(
    records: Sequence[Record], base: Sequence[Record], name: str | None, options: RoundsOptions
) -> dict[str, Any]:
    """One scorer's numbers for a round and its lead over round 0; `name` None is the scorer that ranks."""
    own, first = (_by_prompt(each, name, options.non_answer_score) for each in (records, base))
    return {
        "mean_score": bootstrap(mean, [np.array(list(own.values()))], options.seed) if own else None,
        "difference": _difference(own, first, options.seed),
        "win_rate": _win_rate(_by_prompt(records, name, -math.inf), _by_prompt(base, name, -math.inf)),
    }


def _difference(own: Mapping[str, float], base: Mapping[str, float], seed: int) -> Estimate:
    """The mean difference of scores from round 0's, over prompts with a score in both; prompts are resampled."""
    both = sorted(own.keys() & base.keys())
    if not both:
        return estimate(None, None, None, 0, _NONE_IN_BOTH)
    return bootstrap(mean, [np.array([own[key] - base[key] for key in both])], seed)


def _win_rate(own: Mapping[str, float], base: Mapping[str, float]) -> Estimate:
    """The share of prompts with a higher score than round 0's, ties as ½. A non-answer, −∞, loses to any answer."""
    both = own.keys() & base.keys()
    points = sum(0.5 if own[key] == base[key] else float(own[key] > base[key]) for key in both)
    return wilson(points, len(both), _NONE_IN_BOTH)


def distinct_bigrams(texts: Sequence[str]) -> float | None:
    """Distinct word bigrams over all word bigrams of all answers (Li et al. 2016, distinct-2); None without any."""
    pairs = [pair for words in map(str.split, texts) for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else None


def _best(rows: Sequence[dict[str, Any]], rounds: Mapping[int, Sequence[Record]], options: RoundsOptions) -> int:
    """The best round. Adds to each row its `gain` over the best round before it, prompt by prompt, and its `stop`.

    A round is better than the best before it if the interval of its gain is above 0; otherwise `stop` is true. Each row
    keeps its own `stop`, so that a pipeline that is run again decides after each round as it did before.
    """
    best = rows[0]
    best["gain"], best["stop"] = None, False
    for row in rows[1:]:
        own, before = (_by_prompt(rounds[one["round"]], None, options.non_answer_score) for one in (row, best))
        row["gain"] = gain = _difference(own, before, options.seed)
        row["stop"] = gain["low"] is None or gain["low"] <= 0  # without an interval, nothing shows that it is better
        if not row["stop"]:
            best = row
    number: int = best["round"]
    return number


def _over_optimised(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings of rounds whose score has risen significantly while another scorer's has not."""
    found = []
    for row in rows[1:]:
        if (row["difference"]["low"] or 0) <= 0:
            continue
        risen = f"round {row['round']}: the score of {row['scorer']} has risen by {row['difference']['value']:.3g}"
        for name, measured in row["others"].items():
            other = measured["difference"]
            if other["value"] is None:
                found.append(f"{risen}, and no answer has a score of {name} that could confirm it")
            elif (other["low"] if other["low"] is not None else other["value"]) <= 0:
                found.append(
                    f"{risen}, and that of {name} has not beyond its interval ({other['value']:.3g}): the scorer may "
                    "be over-optimised"
                )
    return found


def to_markdown(results: Mapping[str, Any]) -> str:
    """Warnings and conclusion, then a table with a row for each round."""
    table = rounds_table(results)
    rows = [[f"{cell.value} ({cell.interval})" if cell.interval else cell.value for cell in row] for row in table.rows]
    lines = markdown_table([column.name for column in table.columns], rows)
    return "\n".join([*results["warnings"], table.conclusion, "", lines])
