"""side_by_side.html: a self-contained page with every prompt and the two answers that are compared."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tandem.judge.conclusions import REASONS
from tandem.report.collect import column_order
from tandem.report.markdown import as_html
from tandem.report.page import environment, source
from tandem.report.tables import statistics_rows


def render_side_by_side(results: Mapping[str, Any]) -> str:
    """The page as HTML, from the content of dpo_comparison_results.json. Text of models is escaped."""
    policy, against = results["policy"], results["against"]
    labels = column_order((policy, against))
    templates = environment(autoescape=True)
    templates.filters["formatted"] = as_html
    rows = [
        {
            "messages": row["messages"],
            "answers": [(label, (row["answers"] | {"chosen": row["chosen"]})[label]) for label in labels],
            "non_answers": {label: REASONS.get(why, why) for label, why in row.get("non_answers", {}).items()},
            "winner": row.get(f"winner_model_vs_{against}"),
        }
        for row in results["comparisons"]
    ]
    return templates.get_template("side_by_side.html.jinja").render(
        policy=policy,
        against=against,
        rows=rows,
        outside=results.get("outside_verdicts"),
        statistics=statistics_rows({label: results["statistics"][label] for label in labels}),
        style=Markup(source(templates, "report.css")),
    )
