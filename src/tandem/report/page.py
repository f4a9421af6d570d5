"""report.html: the page on a run, one file that needs neither network nor server."""

import base64
import dataclasses
import hashlib
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from tandem.judge.conclusions import REASONS
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.report.again import commands
from tandem.report.collect import OUTCOMES, Json, Run, as_written, read_run
from tandem.report.markdown import ELEMENTS, formatted
from tandem.report.numbers import (
    duration,
    model_name,
    number,
    percent,
    public,
    show_difference,
    show_interval,
    show_value,
    without_places,
)
from tandem.report.rounds import rounds_section
from tandem.report.tables import (
    benchmarks_table,
    breakdown_tables,
    data_table,
    differences_table,
    metrics_table,
    options_table,
    statistics_table,
    times,
)
from tandem.report.verdict import headline, judgement, spent
from tandem.runs import write_atomic, write_json


@dataclasses.dataclass
class ReportOptions(Options):
    """Report."""

    run_dir: str = opt(REQUIRED, "run folder to report on; report.html and training_metrics.json are written into it")


def write_report(options: ReportOptions) -> Path:
    """Write `report.html`, and the stages' training metrics as one `training_metrics.json`; returns the report's path.

    Raises:
        UserError: the folder holds nothing of a run, or a file in it is damaged.
    """
    run = read_run(options.run_dir)
    metrics = {name: stage.metrics for name, stage in run.stages.items() if stage.metrics is not None}
    if metrics:
        write_json(run.folder / "training_metrics.json", metrics)
    path = run.folder / "report.html"
    # A lone surrogate, which JSON lines of model text may hold, cannot be encoded as UTF-8
    write_atomic(path, render(run).encode("utf-8", errors="replace"))
    return path


def render(run: Run, written: datetime | None = None) -> str:
    """The page as HTML; `written` is the date that it shows, by default now."""
    templates = environment(autoescape=True)
    script = source(templates, "report.js")
    return templates.get_template("report.html.jinja").render(
        run=run,
        title=run.folder.resolve().name,
        headline=headline(run),
        judgement=judgement(run),
        spent=spent(run),
        times=times(run),
        data=data_table(run),
        metrics=metrics_table(run),
        differences=differences_table(run),
        breakdown=breakdown_tables(run),
        benchmarks=benchmarks_table(run),
        statistics=statistics_table(run),
        plots=training_plots(run),
        options=options_table(run),
        commands=commands(run),
        browser=browser_data(run),
        rounds=rounds(run),
        written=(written or datetime.now(UTC)).strftime("%d %B %Y, %H:%M UTC"),
        style=Markup(source(templates, "report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def rounds(run: Run) -> Json | None:
    """What the page shows of rounds.json, with links to the reports on the rounds' trainings."""
    if run.rounds is None:
        return None
    with as_written(run.folder / "rounds.json"):
        numbers = [row["round"] for row in run.rounds["rounds"]]
        links = {number: f"round_{number}/report.html" for number in numbers}
        return rounds_section(
            run.rounds, {number: link for number, link in links.items() if (run.folder / link).is_file()}
        )


def rounds_page(folder: Path, results: Json) -> str:
    """rounds.html, a page on the rounds alone, without a script or a date."""
    templates = environment(autoescape=True)
    return templates.get_template("rounds_page.html.jinja").render(
        title=folder.resolve().name,
        rounds=rounds(Run(folder, rounds=results)),
        style=Markup(source(templates, "report.css")),
    )


def environment(*, autoescape: bool) -> jinja2.Environment:
    """The templates of this package, with filters that format numbers and names."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("tandem.report"),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    templates.filters |= {
        "percent": percent,
        "number": number,
        "value": show_value,
        "interval": show_interval,
        "difference": show_difference,
        "duration": duration,
        "model_name": model_name,
        "public": public,
        "without_places": without_places,
    }
    return templates


def source(templates: jinja2.Environment, name: str) -> str:
    """The source of a file among the templates, such as the style and the script."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def training_plots(run: Run) -> list[Json]:
    """`title`, `note` and `svg` of each drawing that the stages' logs have numbers for."""
    from tandem.report.curves import training_curves  # matplotlib takes a second
    from tandem.report.plots import monitor_plots

    found = list(training_curves(run))
    logs = run.folder / "dpo" / "logs"
    with as_written(logs):
        metrics = run.stages["dpo"].metrics if "dpo" in run.stages else None
        found += monitor_plots(logs, metrics["log_history"] if metrics else [])
    return [{"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in found]


def browser_data(run: Run) -> Json:
    """What the page's script shows of the answers. It is embedded as JSON, and displayed as text."""
    labels = run.judge["labels"] if run.judge else None
    return {
        "labels": [{"id": label, "name": model_name(label)} for label in run.labels],
        "reasons": REASONS,
        "judged_name": model_name(labels["side_2"]) if labels else "Policy",
        "judged": [labels["side_1"], labels["side_2"]] if labels else [],
        "counts": {name: sum(row["outcome"] == name for row in run.answers) for name in OUTCOMES},
        "elements": sorted(ELEMENTS),
        "rows": [
            row | {"formatted": {label: nodes for label, text in row["answers"].items() if (nodes := formatted(text))}}
            for row in run.answers
        ],
    }
