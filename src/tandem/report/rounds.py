"""What report.html, rounds.html and rounds.md show of rounds.json: rounds of DPO on a policy's own answers."""

import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tandem.report.collect import Json
from tandem.report.curves import CHOSEN, DPO, MUTED, SFT, new_figure, to_svg
from tandem.report.numbers import number, percent, show_interval, show_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (DPO, SFT, CHOSEN, MUTED)
_STYLES = ("-", "--", ":", "-.")
_LABEL = 34  # characters of a scorer's name in a drawing, at most


@dataclass(frozen=True)
class Measure:
    """One measure of the rounds: its name and meaning, how it is read from a row, and a level to compare it with."""

    title: str
    meaning: str
    read: Callable[[Mapping[str, Any]], Any]
    is_share: bool = False
    level: float | None = None
    scorer: int | None = None  # index of the scorer whose numbers these are, 0 for the one that ranks; None: of none

    @property
    def name(self) -> str:
        """The title, with the scorer if it is not the one that ranks."""
        return f"{self.title}, {self.meaning}" if self.scorer else self.title


@dataclass(frozen=True)
class Cell:
    """A number and its interval, as text; either may be empty."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """A row for each round, and the conclusion."""

    columns: Sequence[Measure]
    rows: Sequence[Sequence[Cell]]
    conclusion: str


def measures(rows: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """The measures in the rows of rounds.json, those of the lead over round 0 first."""
    others = list(dict.fromkeys(name for row in rows for name in row["others"]))
    found = [
        Measure("Win rate", "prompts won against round 0, ties as ½", lambda row: row["win_rate"], True, 0.5, 0),
        *_of_judge("by the scorer that ranks", 0, _ranked),
        Measure("Score less round 0's", "mean over prompts", lambda row: row["difference"], level=0.0, scorer=0),
        Measure("Score", "mean over prompts", lambda row: row["mean_score"], scorer=0),
    ]
    for place, name in enumerate(others, 1):
        found += [
            Measure("Win rate", f"by {short(name)}", _of(name, "win_rate"), True, 0.5, place),
            *_of_judge(f"by {short(name)}", place, functools.partial(_of, name)),
            Measure("Score less round 0's", f"by {short(name)}", _of(name, "difference"), level=0.0, scorer=place),
        ]
    return [
        *found,
        Measure("KL per token", "from round 0, on the round's own answers, nats", _kl("per_token"), level=0.0),
        Measure("KL per answer", "the same, over whole answers, nats", _kl("per_answer"), level=0.0),
        Measure("Length", "mean, tokens", lambda row: row["mean_tokens"]),
        Measure("Distinct bigrams", "of all word bigrams", lambda row: row["distinct_bigrams"], True),
        Measure("Refusals", "answers that refuse", lambda row: row["refusals"], True),
        Measure("No answer", "empty, cut off, or all thought", lambda row: row["non_answers"], True),
    ]


def _of_judge(who: str, place: int, of: Callable[[str], Callable[[Mapping[str, Any]], Any]]) -> list[Measure]:
    """Measures that only a judge gives that compared a round's answers with round 0's."""
    controlled = f"{who}, were all answers as long as round 0's"
    flips = f"{who}: prompts on which it goes by the order"
    return [
        Measure("Win rate, length controlled", controlled, of("length_controlled"), True, 0.5, place),
        Measure("Verdicts that the order turns", flips, of("order_flip_rate"), True, None, place),
    ]


def _ranked(what: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(what)


def _of(name: str, what: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row["others"].get(name, {}).get(what)


def _kl(what: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: (row.get("kl") or {}).get(what)


def short(scorer: str) -> str:
    """A scorer's kind and the last part of its name: `reward:/models/armo` becomes `reward armo`."""
    kind, _, name = scorer.partition(":")
    return f"{kind} {name.rstrip('/').rpartition('/')[2]}" if name else scorer


def rounds_table(results: Mapping[str, Any]) -> Table:
    """The rounds as text. Columns of which no round has a number are left out."""
    rows = results["rounds"]
    columns = [one for one in measures(rows) if any(_value(one.read(row)) is not None for row in rows)]
    cells = [[_cell(column, row) for column in columns] for row in rows]
    names = [Cell(str(row["round"])) for row in rows]
    first = Measure("Round", "", lambda row: row["round"])
    return Table([first, *columns], [[name, *own] for name, own in zip(names, cells, strict=True)], conclusion(results))


def conclusion(results: Mapping[str, Any]) -> str:
    """Which round is best and by how much, and whether the last one was no better."""
    best = next(row for row in results["rounds"] if row["round"] == results["best_round"])
    if len(results["rounds"]) == 1:
        return "Only round 0 has been measured."
    if not best["round"]:
        return "No round is better than round 0 beyond its interval."
    lead, won = best["difference"], best["win_rate"]
    interval = f" (95% interval {show_interval(lead)})" if show_interval(lead) else ""
    text = f"Round {best['round']} is the best: its score is {show_value(lead)}{interval} above round 0's"
    if won["value"] is not None:
        text += f", and it wins {show_value(won, True)} of {won['n']} prompts"
    return text + (". The last round brought no more." if results["stop"] else ".")


def _value(measured: Any) -> float | None:
    value: float | None = measured.get("value") if isinstance(measured, Mapping) else measured
    return value


def _cell(column: Measure, row: Mapping[str, Any]) -> Cell:
    measured = column.read(row)
    if not row["round"] and column.level is not None:  # round 0 compared with itself
        return Cell("–")
    if isinstance(measured, Mapping):
        return Cell(show_value(measured, column.is_share), show_interval(measured, column.is_share))
    if measured is None:
        return Cell("–")
    return Cell(percent(measured) if column.is_share else number(float(measured)))


def rounds_section(results: Mapping[str, Any], links: Mapping[int, str]) -> Json:
    """What the template needs: `warnings`, `conclusion`, `notes`, `scorer`, `columns`, `rows`, `plots`, `links`."""
    table = rounds_table(results)
    return {
        "warnings": results["warnings"],
        "conclusion": table.conclusion,
        "notes": list(_notes(results["rounds"])),
        "columns": table.columns,
        "rows": table.rows,
        "plots": [
            {"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in rounds_plots(results["rounds"])
        ],
        "links": links,
    }


def _notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    last = rows[-1]
    yield (
        f"{last['answers']} answers a round to held-out prompts. Scores are those of {short(last['scorer'] or '–')} "
        "unless another is named. Ranges are 95% intervals; those of scores and KL resample prompts."
    )
    names = [last["scorer"], *last["others"]]
    if judges := [short(name) for name in names if (name or "").startswith("judge:")]:
        yield (
            f"The {' and the '.join(judges)} compared each answer with round 0's to the same prompt, in both orders: "
            "1 for better, 0 for worse, ½ for a tie and where the order decides. Here nobody has tried it on pairs "
            "labelled by people."
        )
    if not last["others"]:
        yield "Nobody but the scorer that ranks has scored these answers, so over-optimisation would not show."
    lost = last["answers"] - last["difference"]["n"]
    if lost > 0 and len(rows) > 1:
        yield f"Of the last round, {lost} answers have no score in both rounds and are not in the scores' differences."
    if reason := next((row["kl"]["why"] for row in rows if (row.get("kl") or {}).get("why")), None):
        yield f"KL: {reason}."


def rounds_plots(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Title, note and SVG of a drawing for each measure over the rounds, with a curve for each scorer that has it."""
    found = [one for one in measures(rows) if any(_value(one.read(row)) is not None for row in rows)]
    for title in dict.fromkeys(one.title for one in found):
        lines = [one for one in found if one.title == title]
        figure = _draw(lines, rows)
        values = [f"{_cell(lines[0], row).value} at round {row['round']}" for row in rows]
        told = f"{title}: {', '.join(values)}"
        yield title, lines[0].meaning, to_svg(figure, told)


def _draw(lines: Sequence[Measure], rows: Sequence[Mapping[str, Any]]) -> "Figure":
    figure, axes = new_figure()
    scale = 100 if lines[0].is_share else 1
    if lines[0].level is not None:
        axes.axhline(scale * lines[0].level, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    for place, line in enumerate(lines):
        points = [(row["round"], line.read(row)) for row in rows]
        drawn = [(at, one) for at, one in points if _value(one) is not None]
        colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place % len(_STYLES)]
        numbers = [at for at, _ in drawn]
        values = [scale * float(_value(one)) for _, one in drawn]  # type: ignore[arg-type]
        label = textwrap.shorten(line.meaning, _LABEL, placeholder="…") if line.scorer else "by the scorer that ranks"
        axes.plot(numbers, values, style, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
        for at, one in drawn:
            if isinstance(one, Mapping) and one.get("low") is not None:
                axes.plot([at, at], [scale * one["low"], scale * one["high"]], color=colour, linewidth=1.2, alpha=0.6)
    if len(lines) > 1:
        figure.legend(frameon=False, labelcolor=MUTED, fontsize=9, handlelength=1.8, loc="outside upper left")
    axes.set_xticks([row["round"] for row in rows])
    axes.set_xlim(rows[0]["round"] - 0.15, rows[-1]["round"] + 0.15)
    axes.set_xlabel("round", color=MUTED)
    if lines[0].is_share:
        axes.yaxis.set_major_formatter("{x:g}%")
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    return figure
