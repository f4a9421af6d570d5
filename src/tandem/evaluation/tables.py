"""results.json as Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.intervals import Estimate
from tandem.markdown_table import markdown_table


def to_markdown(results: Mapping[str, Any]) -> str:
    """The metrics, the models' differences and the breakdown, as Markdown tables."""
    models = results["models"]
    # The reference, which comes first, lacks some metrics: their order is that of the last policy
    names = list(dict.fromkeys(name for metrics in reversed(models.values()) for name in metrics))
    tables = [
        markdown_table(
            [f"{results['n_pairs']} held-out pairs", *models],
            [[_words(name), *(_cell(metrics.get(name)) for metrics in models.values())] for name in names],
        )
    ]
    found = results["differences"]
    tables.append(
        markdown_table(
            ["difference", *(f"{each['model']} − {each['other']}" for each in found)],
            [
                [_words(name), *(_cell(each["metrics"].get(name)) for each in found)]
                for name in names
                if any(name in each["metrics"] for each in found)
            ],
        )
    )
    for by, groups in results["breakdown"].items():
        if groups:
            tables.append(_breakdown_table(by, groups))
    if rows := results.get("benchmarks"):
        tables.append(
            markdown_table(
                ["benchmark", *models],
                [
                    [f"{row['task']}, {row['metric']}", *(_cell(row["models"].get(label)) for label in models)]
                    for row in rows
                ],
            )
        )
    return "\n\n".join(tables)


def _breakdown_table(by: str, groups: Sequence[Mapping[str, Any]]) -> str:
    labels = list(groups[0]["models"])
    rows = []
    for group in groups:
        low, high = group["tokens"]
        name = f"{_words(group['name'])} ({low:+d} to {high:+d} tokens)" if by == "length_difference" else group["name"]
        shown = [
            _cell(group["models"][label][metric])
            for metric in ("preference_accuracy", "mean_margin")
            for label in labels
        ]
        rows.append([name, str(group["n"]), *shown])
    header = [f"by {_words(by)}", "pairs"]
    return markdown_table(
        [*header, *(f"{metric}, {label}" for metric in ("accuracy", "margin") for label in labels)], rows
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    text = f"{estimate['value']:.3f}"
    if estimate["low"] is not None:
        text += f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    if "p" in estimate:
        text += f", p = {estimate['p']:.2g}"
    return text
