"""report.html: one file that a person opens at the end of a run, with no network and no server."""

import base64
import dataclasses
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tandem.judge.calibration import REASONS, distrust, untried
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.report.collect import OUTCOMES, Json, Run, as_written, read_run
from tandem.runs import write_atomic, write_json

MODEL_NAMES = {"base": "Base", "sft": "SFT", "dpo": "DPO", "chosen": "Chosen in the data"}

# Options worth seeing at a glance; the whole of them is in the YAML below the table
SHOWN_OPTIONS = (
    "model_name_or_path",
    "dataset_name",
    "dataset_train_split",
    "max_train_samples",
    "max_length",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "use_peft",
    "lora_r",
    "beta",
    "loss_type",
    "label_smoothing",
    "layout",
    "seed",
)
_SETTING = re.compile(r"[A-Z_]+=")  # as `stage` of pipelines/lib.sh puts before a command
_SCRIPT = re.compile(r"(.*/)scripts/\w+\.py")
CALLS = {"labelled": "Labelled pairs", "self": "Answers against themselves", "main": "Models compared"}


@dataclasses.dataclass
class ReportOptions(Options):
    """Report."""

    run_dir: str = opt(REQUIRED, "run folder to report on; report.html and training_metrics.json are written into it")


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a held-out metric is shown."""

    title: str
    meaning: str
    is_share: bool = False


METRICS = {
    "preference_accuracy": Metric(
        "Preference accuracy", "pairs whose chosen answer has the higher implicit reward", is_share=True
    ),
    "mean_margin": Metric(
        "Mean margin", "log-odds of chosen over rejected against the reference, in nats: 0.7 doubles the odds"
    ),
    "median_margin": Metric("Median margin", "half of the pairs have more, nats"),
    "ranking_accuracy": Metric(
        "Ranking accuracy", "pairs whose chosen answer is the likelier one, by itself", is_share=True
    ),
    "perplexity_chosen": Metric(
        "Perplexity of chosen",
        "as many tokens were equally likely, on average, at each place of a chosen answer; 1 is certainty",
    ),
    "kl_per_token": Metric("KL per token", "from the reference, on the model's own answers, nats"),
    "kl_per_sequence": Metric("KL per answer", "the same, over whole answers, nats"),
}
BREAKDOWNS = {"length_difference": "By length of chosen less rejected", "source": "By source"}
STATISTICS = {
    "n": Metric("Answers", "prompts answered"),
    "mean_tokens": Metric("Mean length", "tokens"),
    "mean_characters": Metric("Mean length", "characters"),
    "truncated": Metric("Truncated", "stopped by the length limit", is_share=True),
    "empty": Metric("Empty", "no text at all", is_share=True),
    "refusal": Metric("Refusals", "answers that refuse", is_share=True),
    "repetition": Metric("Repetition", "word trigrams that are repeats", is_share=True),
}


def write_report(options: ReportOptions) -> Path:
    """Write `report.html`, and `training_metrics.json` from those of the stages; returns the report's path.

    Raises:
        UserError: nothing of a run in the folder, or a damaged file.
    """
    run = read_run(options.run_dir)
    metrics = {name: stage.metrics for name, stage in run.stages.items() if stage.metrics is not None}
    if metrics:
        write_json(run.folder / "training_metrics.json", metrics)
    path = run.folder / "report.html"
    # A lone surrogate, which JSON lines of model text may hold, has no UTF-8
    write_atomic(path, render(run).encode("utf-8", errors="replace"))
    return path


def render(run: Run, written: datetime | None = None) -> str:
    """The page as HTML; `written` is the date it shows, now if unset."""
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
        statistics=statistics_table(run),
        plots=training_plots(run),
        options=options_table(run),
        commands=commands(run),
        browser=browser_data(run),
        written=(written or datetime.now(UTC)).strftime("%d %B %Y, %H:%M UTC"),
        style=Markup(source(templates, "report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def environment(*, autoescape: bool) -> jinja2.Environment:
    """The templates of this package, with filters that write numbers for people."""
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
    }
    return templates


def source(templates: jinja2.Environment, name: str) -> str:
    """A template as it stands, as style and script are."""
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def percent(share: float) -> str:
    """0.583 → 58.3%."""
    return f"{100 * share:.1f}%"


def number(value: float) -> str:
    """Counts as they are, measured numbers to three digits, with a true minus."""
    is_whole = isinstance(value, int) or abs(value) >= 1000
    text = f"{round(value):,}" if is_whole else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def show_value(estimate: Mapping[str, Any] | None, is_share: bool = False) -> str:
    """The value of an estimate."""
    if estimate is None or estimate.get("value") is None:
        return "–"
    return percent(estimate["value"]) if is_share else number(estimate["value"])


def show_interval(estimate: Mapping[str, Any] | None, is_share: bool = False) -> str:
    """The interval of an estimate, empty if it has none."""
    if estimate is None or estimate.get("low") is None or estimate.get("high") is None:
        return ""
    show = percent if is_share else number
    return f"{show(estimate['low'])} to {show(estimate['high'])}"


def show_difference(estimate: Mapping[str, Any] | None, is_share: bool = False) -> Json:
    """A difference as `value` with its sign, `interval` and `p`; shares in percentage points."""
    if estimate is None:
        return {"value": "–", "interval": "", "p": ""}

    def signed(value: float | None) -> str:
        if value is None:
            return ""
        text = f"{100 * value:.1f}" if is_share else f"{value:#.3g}".rstrip(".")
        return ("" if value < 0 else "+") + text.replace("-", "−")

    value, low, high = (signed(estimate[end]) for end in ("value", "low", "high"))
    return {
        "value": f"{value} points" if is_share else value,
        "interval": f"{low} to {high}" if low and high else "",
        "p": show_p(estimate["p"]) if "p" in estimate else "",
    }


def show_p(p: float) -> str:
    """A p-value; below a thousandth its size means little."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def duration(seconds: float) -> str:
    """75 → 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def public(value: Any) -> str:
    """A model or a data set as the page may show it: of a path on this machine, its last part."""
    text = str(value)
    return Path(text).name if text.startswith(("/", "./", "../", "~")) else text


def model_name(label: str) -> str:
    """What a model label is called on the page."""
    return MODEL_NAMES.get(label, label)


def headline(run: Run) -> Json:
    """The verdict: `tag`, `sentence`, `calibration`, `distrust`, `besides` and `measured`.

    `distrust` are reasons not to trust the judge, `besides` those against a winner that the sentence does not give.
    """
    measured = _measured(run)
    if run.judge is None:
        return {
            "tag": "Not judged",
            "tone": "open",
            "sentence": "No judge has compared these models, so nothing here says which one answers better.",
            "calibration": None,
            "distrust": [],
            "was_tried": False,
            "besides": [],
            "measured": measured,
        }
    with as_written(run.folder / "judge_summary.json"):
        calibration, winner = run.judge["calibration"], run.judge["winner"]
        return {
            "tag": f"{model_name(winner)} wins" if winner else "No winner named",
            "tone": "decided" if winner else "open",
            "sentence": _with_names(run.judge["conclusion"], run.judge["labels"].values()),
            "calibration": _calibration(run.judge),
            "distrust": distrust(calibration["labelled"], run.judge["result"], calibration["max_flip_rate"]),
            "was_tried": calibration["labelled"]["accuracy"]["value"] is not None,
            "besides": [_with_names(reason, run.judge["labels"].values()) for reason in run.judge["why"][1:]],
            "measured": measured,
        }


def _with_names(sentence: str, labels: Iterable[str]) -> str:
    for label in labels:
        sentence = re.sub(rf"\b{re.escape(label)}\b(?!-)", model_name(label), sentence)
    return sentence


def _calibration(judge: Json) -> str:
    labelled, result = judge["calibration"]["labelled"], judge["result"]
    accuracy, flips, first = labelled["accuracy"], result["order_flip_rate"], result["first_position_rate"]
    if accuracy["value"] is None:
        parts = [untried(labelled).capitalize()]
    else:
        parts = [
            f"On {accuracy['n']} pairs labelled by people the judge agrees with them in {percent(accuracy['value'])} "
            f"(95% interval {show_interval(accuracy, True)}; chance is 50%)"
        ]
    if flips["value"] is not None:
        parts.append(f"it changes sides with the order of the answers in {percent(flips['value'])}")
    if first["value"] is not None:
        parts.append(f"it names the answer shown first in {percent(first['value'])} of its decisions")
    return "; ".join(parts) + "."


def _measured(run: Run) -> str | None:
    """The held-out preference accuracies as a sentence."""
    if run.results is None:
        return None
    with as_written(run.folder / "results.json"):
        accuracies = {
            label: metrics["preference_accuracy"]
            for label, metrics in run.results["models"].items()
            if "preference_accuracy" in metrics
        }
        if not accuracies:
            return None
        parts = [
            f"the {model_name(label)} model prefers the chosen answer in {percent(estimate['value'])}"
            + (f" ({interval})" if (interval := show_interval(estimate, True)) else "")
            for label, estimate in sorted(accuracies.items(), key=lambda item: item[0] != "dpo")
        ]
        return f"On {run.results['n_pairs']} held-out pairs, " + "; ".join(parts) + "."


def metrics_table(run: Run) -> Json | None:
    """`labels`, and `rows` of a `Metric` with an estimate for each label."""
    if run.results is None:
        return None
    with as_written(run.folder / "results.json"):
        models = run.results["models"]
        rows = [
            {"name": name, "metric": metric, "estimates": [metrics.get(name) for metrics in models.values()]}
            for name, metric in METRICS.items()
            if any("value" in metrics.get(name, ()) for metrics in models.values())
        ]
        accuracies = {
            label: models[label]["preference_accuracy"] for label in models if "preference_accuracy" in models[label]
        }
        return {"labels": list(models), "rows": rows, "accuracies": accuracies}


def differences_table(run: Run) -> Json | None:
    """`pairs` of model labels, and `rows` of a `Metric` with the difference of each pair of models."""
    if run.results is None:
        return None
    with as_written(run.folder / "results.json"):
        found = run.results["differences"]
        names = [name for name in METRICS if any(name in each["metrics"] for each in found)]
        return {
            "pairs": [(each["model"], each["other"]) for each in found],
            "rows": [
                {"metric": METRICS[name], "differences": [each["metrics"].get(name) for each in found]}
                for name in names
            ],
        }


def breakdown_tables(run: Run) -> list[Json]:
    """For each way of breaking down: its `title`, the `labels` and the `rows` of a name, pairs, and two metrics."""
    if run.results is None:
        return []
    with as_written(run.folder / "results.json"):
        return [
            {
                "title": BREAKDOWNS[by],
                "labels": list(groups[0]["models"]),
                "rows": [_breakdown_row(by, group) for group in groups],
            }
            for by, groups in run.results["breakdown"].items()
            if groups
        ]


def _breakdown_row(by: str, group: Json) -> Json:
    low, high = group["tokens"]
    by_length = by == "length_difference"
    return {
        "name": f"{low:+d} to {high:+d} tokens".replace("-", "−") if by_length else group["name"],
        "n": group["n"],
        "accuracies": [metrics["preference_accuracy"] for metrics in group["models"].values()],
        "margins": [metrics["mean_margin"] for metrics in group["models"].values()],
    }


def judgement(run: Run) -> Json | None:
    """What the judge said, how far it can be trusted, and how its calls ended: rows of title, meaning, estimate."""
    if run.judge is None:
        return None
    with as_written(run.folder / "judge_summary.json"):
        result, calibration = run.judge["result"], run.judge["calibration"]
        agreed, mean = result["orders_agree"], result["mean_of_orders"]
        labelled, by_length = calibration["labelled"], calibration["labelled"]["accuracy_by_length"]
        counts = f"of {agreed['wins']} wins and {agreed['losses']} losses; sign test {show_p(agreed['sign_test_p'])}"
        said = [
            ("Win rate, both orders agreeing", counts, agreed["win_rate"]),
            (
                "Win rate, mean of the orders",
                f"{mean['wins']} wins, {mean['ties']} ties, {mean['losses']} losses",
                mean["win_rate"],
            ),
            ("Mean score", "win 1, tie ½, loss 0", result["mean_score"]),
            ("Win rate, length controlled", "were both answers equally long", result["length_controlled"]),
            (
                "If every missing prompt were lost",
                f"{result['n_missing']} without a verdict in both orders",
                result["bounds"]["missing_as_losses"]["win_rate"],
            ),
            ("Names the answer shown first", "50% is no preference", result["first_position_rate"]),
            ("Changes sides with the order", "of prompts with a winner in both orders", result["order_flip_rate"]),
        ]
        trust = [
            ("Agrees with people", "on held-out pairs they labelled; chance is 50%", labelled["accuracy"]),
            ("… where rejected is longer", "", by_length["rejected_longer"]),
            ("… where both are alike in length", "", by_length["similar"]),
            ("… where chosen is longer", "", by_length["chosen_longer"]),
            ("Changes sides with the order", "on the same pairs", labelled["order_flip_rate"]),
            ("Calls an answer equal to itself", "should be 100%", calibration["self_vs_self"]["tie_rate"]),
        ]
        return {
            "model": run.judge["judge"]["model"],
            "schema_enforced": run.judge["judge"]["schema_enforced"],
            "policy": model_name(run.judge["labels"]["side_2"]),
            "other": model_name(run.judge["labels"]["side_1"]),
            "n_prompts": result["n_prompts"],
            "said": said,
            "trust": trust,
            "kappa": labelled["cohen_kappa"],
            "endings": list(run.judge["accounting"]["main"]),
            "accounting": [(CALLS[kind], list(ends.values())) for kind, ends in run.judge["accounting"].items()],
        }


def spent(run: Run) -> str | None:
    """Replies, tokens and cost of the judge as a sentence."""
    if run.usage is None:
        return None
    with as_written(run.folder / "judge" / "usage.json"):
        cost = run.usage["cost"]
        tokens = f"{number(run.usage['input_tokens'])} tokens in and {number(run.usage['output_tokens'])} out"
        price = "No prices were given, so the cost is not known."
        if cost is not None:
            price = f"Cost: {number(float(cost))}, in the currency of the prices given."
        return f"{number(run.usage['replies'])} replies, {tokens}. {price}"


def data_table(run: Run) -> Json | None:
    """`splits`, `findings` and the pairs `shown` of the data check, with what the page needs of each."""
    if run.data is None:
        return None
    counts = ("pairs", "prompts", "chosen_longer", "bag_of_words", "formats", "sources", "languages", "fingerprint")
    parts = ("name", "level", "message", "count", "examples")
    with as_written(run.folder / "data_report.json"):
        splits = [
            {name: split[name] for name in counts}
            | {"name": title, "tokens": [number(each["median"]) for each in split.get("tokens", {}).values()]}
            for title, split in run.data["splits"].items()
        ]
        findings = [{part: finding[part] for part in parts} for finding in run.data["findings"]]
        return {"splits": splits, "findings": findings, "shown": run.data["shown"]}


def statistics_table(run: Run) -> Json | None:
    """`statistics_rows` of the run's comparison."""
    if run.comparison is None:
        return None
    with as_written(run.folder / "dpo_comparison_results.json"):
        return statistics_rows(run.comparison["statistics"])


def statistics_rows(statistics: Mapping[str, Json]) -> Json:
    """`labels`, and `rows` of a `Metric` with a value for each label."""
    names = dict.fromkeys(name for values in statistics.values() for name in values)
    rows = [
        {"metric": _metric(STATISTICS, name), "values": [values.get(name) for values in statistics.values()]}
        for name in names
    ]
    return {"labels": list(statistics), "rows": rows}


def _metric(known: Mapping[str, Metric], name: str) -> Metric:
    return known.get(name) or Metric(name.replace("_", " ").capitalize(), "")


def training_plots(run: Run) -> list[Json]:
    """`title`, `note` and `svg` of every drawing that the logs of the stages have numbers for."""
    from tandem.report.curves import training_curves  # matplotlib takes a second
    from tandem.report.plots import monitor_plots

    found = list(training_curves(run))
    logs = run.folder / "dpo" / "logs"
    with as_written(logs):
        metrics = run.stages["dpo"].metrics if "dpo" in run.stages else None
        found += monitor_plots(logs, metrics["log_history"] if metrics else [])
    return [{"title": title, "note": note, "svg": Markup(svg)} for title, note, svg in found]


def options_table(run: Run) -> list[tuple[str, list[Any]]]:
    """The options worth seeing, each with its value in every stage; None where a stage has no such option."""
    configs = [stage.config for stage in run.stages.values()]
    names = [name for name in SHOWN_OPTIONS if any(config.get(name) is not None for config in configs)]
    return [(name, [_shown(config.get(name)) for config in configs]) for name in names]


def _shown(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def browser_data(run: Run) -> Json:
    """What the page's script shows of the answers; embedded as JSON, and put on screen as text."""
    labels = run.judge["labels"] if run.judge else None
    return {
        "labels": [{"id": label, "name": model_name(label)} for label in run.labels],
        "reasons": REASONS,
        "judged_name": model_name(labels["side_2"]) if labels else "Policy",
        "judged": [labels["side_1"], labels["side_2"]] if labels else [],
        "counts": {name: sum(row["outcome"] == name for row in run.answers) for name in OUTCOMES},
        "rows": run.answers,
    }


def times(run: Run) -> list[tuple[str, int, str]]:
    """Each stage of the pipeline with its seconds and, of the judge, its cost."""
    with as_written(run.folder / "judge" / "usage.json"):
        cost = "not known" if run.usage is None or run.usage["cost"] is None else number(float(run.usage["cost"]))
    return [(name, seconds, cost if name == "judge" else "–") for name, seconds in run.seconds.items()]


def commands(run: Run) -> Json:
    """Command lines that run the same again in a new folder: of the whole `pipeline`, and of single training `stages`.

    The pipeline's are those that its stages ran with, from the root of a checkout.
    """
    folder = run.folder.resolve()
    again = folder.with_name(f"{folder.name}_again")
    return {
        "pipeline": _pipeline_again(run),
        "stages": [
            f"python scripts/{name}.py --config {_quoted(folder / name / 'config.yaml')} "
            f"--output_dir {_quoted(again / name)}"
            for name, stage in run.stages.items()
            if stage.config_yaml is not None
        ],
    }


def _pipeline_again(run: Run) -> list[str]:
    """The stages' commands, after the shell variables that they were written down with."""
    settings: dict[str, str] = {}
    lines = []
    for words in run.commands.values():
        command = list(itertools.dropwhile(_SETTING.match, words))
        settings |= dict(word.split("=", 1) for word in words[: len(words) - len(command)])
        lines.append(command)
    if "RUN" not in settings:
        return []
    folder = settings["RUN"]
    root = next((found[1] for line in lines for word in line if (found := _SCRIPT.fullmatch(word))), "")

    def moved(word: str) -> str:
        if word == folder or word.startswith(f"{folder}/"):
            word = word.replace(folder, f"{folder}_again", 1)
        return shlex.quote(word.removeprefix(root))

    return [
        *(f"git checkout {sha}" for sha in [_commit(run)] if sha),
        "source pipelines/lib.sh",
        *(f"{name}={moved(value)}" for name, value in settings.items()),
        *(" ".join(map(moved, line)) for line in lines),
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _commit(run: Run) -> str | None:
    return next((shlex.quote(sha) for stage in run.stages.values() if (sha := stage.run.get("git_sha"))), None)
