"""ranking.html and the console's table: several models ranked, and how far the judges can be trusted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tandem.report.numbers import number, percent, show_interval, show_value
from tandem.report.page import environment, source
from tandem.runs import write_atomic

Json = dict[str, Any]
KINDS = (("strength", "Strength"), ("length_controlled", "Length controlled"))


def write_ranking(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page, which needs no network and has no script. Names of models and judges are escaped."""
    templates = environment(autoescape=True)
    html = templates.get_template("ranking.html.jinja").render(
        result=result,
        boards=[_board(title, found) for title, found in _boards(result)],
        kappas=_kappas(result),
        style=Markup(source(templates, "report.css")),
    )
    write_atomic(path, html.encode("utf-8", errors="replace"))


def _boards(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What is shown: the result of the judges together, if several are believed, and each judge's own."""
    judges = result["judges"]
    own = [(f"By {judge['model']}", judge) for judge in judges]
    believed = sum(not judge["distrust"] for judge in judges)
    return [(f"By {believed} judges together", result["together"]), *own] if believed > 1 else own


def _board(title: str, found: Mapping[str, Any]) -> Json:
    models = found["models"]
    kind = "length_controlled" if _whole(models, "length_controlled") else "strength"
    order = sorted(models, key=lambda label: -(models[label][kind]["value"] or 0.0))
    return {
        "title": title,
        "distrust": found.get("distrust", []),
        "warnings": found.get("warnings", []),
        "bounded_by": found["bounded_by"],
        "why": {
            name: models[order[0]][name]["why"] for name, _ in KINDS if models[order[0]][name].get("why") is not None
        },
        "plots": [(title, _plot(models, order, name)) for name, title in KINDS if _whole(models, name)],
        "rows": [_row(label, models[label]) for label in order],
        "order": order,
        "scores": _scores(found["against"], order),
    }


def _whole(models: Mapping[str, Any], name: str) -> bool:
    return all(each[name]["value"] is not None for each in models.values())


def _row(label: str, model: Mapping[str, Any]) -> Json:
    places = model["strength"].get("ranks"), model["length_controlled"].get("ranks")
    return {
        "label": label,
        "estimates": [model[name] for name, _ in KINDS],
        "ranks": [_places(each) for each in places],
        "mean_score": model["mean_score"],
    }


def _places(ranks: Sequence[int] | None) -> str:
    if ranks is None:
        return "–"
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]} to {ranks[1]}"


def _plot(models: Mapping[str, Any], order: Sequence[str], name: str) -> Json:
    """Positions in percent of the plot's width. Its ends are round numbers beyond every interval."""
    estimates = [models[label][name] for label in order]
    most = max(max(abs(each["low"]), abs(each["high"])) for each in estimates)
    step = next(step for step in (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 1e9) if most <= 4 * step)
    end = step * max(1, -(-most // step))

    def place(value: float) -> float:
        return round(50 + 50 * value / end, 2)

    return {
        "ends": [f"−{end:g}", "0, the average model", f"+{end:g}"],
        "rows": [
            {"label": label, "estimate": each, "dot": place(each["value"]), "left": place(each["low"])}
            | {"width": round(place(each["high"]) - place(each["low"]), 2)}
            for label, each in zip(order, estimates, strict=True)
        ],
    }


def _scores(against: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[list[str]]:
    """The mean score of each row's model against each column's model."""
    found = {(label, label): "" for label in order}
    for row in against:
        score = row["score"]["value"]
        found[row["label"], row["other"]] = "–" if score is None else percent(score)
        found[row["other"], row["label"]] = "–" if score is None else percent(1 - score)
    return [[found[row, column] for column in order] for row in order]


def _kappas(result: Mapping[str, Any]) -> list[Json]:
    names = [judge["model"] for judge in result["judges"]]
    return [
        {"pair": f"{names[row['one']]} and {names[row['other']]}", "n": row["n"], "same": row.get("same")}
        | {"kappa": row["kappa"], "why": row.get("why")}
        for row in result["agreement"]
    ]


def table(result: Mapping[str, Any]) -> str:
    """The ranking as plain text: by all judges together, then by each."""
    lines = []
    for title, found in _boards(result):
        board = _board(title, found)
        rows = [("model", "strength", "95% interval", "length controlled", "95% interval", "rank", "mean score")]
        for row in board["rows"]:
            raw, controlled = row["estimates"]
            rows.append(
                (
                    row["label"],
                    show_value(raw),
                    show_interval(raw),
                    show_value(controlled),
                    show_interval(controlled),
                    row["ranks"][1] if row["ranks"][1] != "–" else row["ranks"][0],
                    show_value(row["mean_score"], True),
                )
            )
        widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
        lines.append(f"{title}:")
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines += [f"  {name}: {why}" for name, why in board["why"].items()]
        lines += [f"  not believed: {reason}" for reason in board["distrust"]]
        lines += [f"  {warning}" for warning in board["warnings"]]
    for row in _kappas(result):
        kappa = f"none ({row['why']})" if row["kappa"] is None else f"{number(row['kappa'])}, {row['n']} comparisons"
        lines.append(f"κ of {row['pair']}: {kappa}")
    return "\n".join(lines)
