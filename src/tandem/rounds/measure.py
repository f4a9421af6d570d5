"""What the rounds have brought on the held-out prompts, measured against round 0."""

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tandem.answers.refusals import is_refusal
from tandem.errors import UserError
from tandem.intervals import Estimate, bootstrap, estimate, mean, wilson
from tandem.rounds.names import ROUNDS_FILE, SCORES
from tandem.rounds.options import RoundsOptions
from tandem.rounds.records import Record, read_records
from tandem.runs import write_atomic, write_json

_FOLDER = re.compile(r"round_(\d+)")


def measure(options: RoundsOptions) -> dict[str, Any]:
    """Read round_<r>/held_out/scores.jsonl of each round and write rounds.json, rounds.md and rounds.html.

    Raises:
        UserError: round 0 is missing, or a round answers other prompts than round 0.
    """
    folder = Path(options.run_dir)
    rounds = _read(folder)
    rows = [_row(number, rounds[number], rounds[0], options.seed) for number in sorted(rounds)]
    results = {"rounds": rows, **_conclusion(rows), "warnings": _over_optimised(rows)}
    write_json(folder / ROUNDS_FILE, results)
    write_atomic(folder / "rounds.md", to_markdown(results) + "\n")
    write_atomic(folder / "rounds.html", to_html(results).encode(errors="replace"))
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


def _by_prompt(records: Sequence[Record], name: str | None) -> dict[str, float]:
    """The mean score of each prompt; by the scorer that ranks, or another."""
    values: dict[str, list[float]] = {}
    for record in records:
        score = record["score"] if name is None else record.get("scores", {}).get(name)
        if score is not None:
            values.setdefault(record["prompt_id"], []).append(score)
    return {key: fmean(own) for key, own in values.items()}


def _row(number: int, records: Sequence[Record], base: Sequence[Record], seed: int) -> dict[str, Any]:
    ranked = next((record["scorer"] for record in records if record.get("scorer")), None)
    names = sorted({name for record in records for name in record.get("scores", {})} - {ranked})
    lengths = [record["n_tokens"] for record in records if record.get("n_tokens") is not None]
    own = _by_prompt(records, None)
    return {
        "round": number,
        "answers": len(records),
        "scorer": ranked,
        "mean_score": bootstrap(mean, [np.array(list(own.values()))], seed) if own else None,
        "difference": _difference(own, _by_prompt(base, None), seed),
        "win_rate": _win_rate(own, _by_prompt(base, None)),
        "others": {name: _difference(_by_prompt(records, name), _by_prompt(base, name), seed) for name in names},
        "mean_tokens": fmean(lengths) if lengths else None,
        "mean_characters": fmean(len(record["text"]) for record in records),
        "distinct_bigrams": distinct_bigrams([record["text"] for record in records]),
        "refusals": fmean(is_refusal(record["text"]) for record in records),
        "non_answers": fmean(record.get("non_answer") is not None for record in records),
    }


def _difference(own: Mapping[str, float], base: Mapping[str, float], seed: int) -> Estimate:
    """Mean score less round 0's over prompts that both have a score on; prompts are resampled."""
    both = sorted(own.keys() & base.keys())
    if not both:
        return estimate(None, None, None, 0, "no prompt has a score in both rounds")
    return bootstrap(mean, [np.array([own[key] - base[key] for key in both])], seed)


def _win_rate(own: Mapping[str, float], base: Mapping[str, float]) -> Estimate:
    signs = [np.sign(own[key] - base[key]) for key in own.keys() & base.keys()]
    return wilson(float(sum((sign + 1) / 2 for sign in signs)), len(signs), "no prompt has a score in both rounds")


def distinct_bigrams(texts: Sequence[str]) -> float | None:
    """Distinct over all word bigrams of all answers (Li et al. 2016, distinct-2); None where there is none."""
    pairs = [pair for words in map(str.split, texts) for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else None


def _conclusion(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best round by the mean difference to round 0, and whether the last has brought no more.

    A round brings more where the lower end of its interval is above the difference of the best round before it. Each
    row gets its own `stop`, so that a pipeline that is run again takes the turns it took.
    """
    best = rows[0]
    best["stop"] = False
    for row in rows[1:]:
        value, low = row["difference"]["value"], row["difference"]["low"]
        before = best["difference"]["value"] or 0.0
        row["stop"] = value is None or (low if low is not None else value) <= before
        if value is not None and value > before:
            best = row
    return {"best_round": best["round"], "stop": rows[-1]["stop"]}


def _over_optimised(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rounds whose score has risen beyond its interval while another scorer's has not."""
    found = []
    for row in rows[1:]:
        if (row["difference"]["low"] or 0) <= 0:
            continue
        for name, other in row["others"].items():
            if other["value"] is not None and (other["low"] if other["low"] is not None else other["value"]) <= 0:
                risen = f"{row['scorer']} has risen by {row['difference']['value']:.3g}"
                found.append(
                    f"round {row['round']}: the score of {risen}, "
                    f"and that of {name} has not ({other['value']:.3g}): the scorer may be over-optimised"
                )
    return found


_COLUMNS = (
    "round",
    "difference to round 0",
    "win rate",
    "score",
    "tokens",
    "distinct bigrams",
    "refusals",
    "no answer",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(value: float | None, form: str = ".3g") -> str:
        return "–" if value is None else format(value, form)

    def with_interval(one: Estimate | None, form: str = ".3g") -> str:
        if one is None or one["value"] is None:
            return "–"
        interval = "" if one["low"] is None else f" ({one['low']:{form}} to {one['high']:{form}})"
        return f"{one['value']:{form}}{interval}"

    return [
        str(row["round"]),
        with_interval(row["difference"]),
        with_interval(row["win_rate"], ".1%"),
        with_interval(row["mean_score"]),
        shown(row["mean_tokens"], ".1f"),
        shown(row["distinct_bigrams"], ".2f"),
        shown(row["refusals"], ".1%"),
        shown(row["non_answers"], ".1%"),
    ]


def _headline(results: Mapping[str, Any]) -> list[str]:
    best = f"The best round is {results['best_round']}."
    return [*results["warnings"], best + (" The last round brought no more." if results["stop"] else "")]


def to_markdown(results: Mapping[str, Any]) -> str:
    """What to know first, and a row a round."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in results["rounds"]]
    return "\n".join([*_headline(results), "", *lines])


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse}th,td{padding:.3rem .6rem;border-bottom:1px solid #bbb}
td,th{text-align:right}
.warning{border-left:.3rem solid #b00;padding-left:.6rem}@media print{body{margin:0}.wide{overflow:visible}}"""


def to_html(results: Mapping[str, Any]) -> str:
    """The page of rounds: no script, nothing loaded; whatever a name holds is text."""
    escape = html.escape
    warnings = "".join(f'<p class="warning">{escape(line)}</p>' for line in results["warnings"])
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in results["rounds"]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Rounds</title><style>{_STYLE}</style><h1>Rounds</h1>{warnings}<p>{escape(_headline(results)[-1])}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "<p>On the held-out prompts; 95% intervals by resampling prompts.</p></html>\n"
    )
