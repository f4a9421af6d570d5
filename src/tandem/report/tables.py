"""The contents of the page's tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tandem.report.collect import Json, Run, as_written
from tandem.report.numbers import number


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


# The options that the table shows; all of them are in the YAML below it
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
    """For each breakdown its `title`, the `labels`, and `rows` of a name, the number of pairs, and two metrics."""
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


def benchmarks_table(run: Run) -> Json | None:
    """`labels`, and `rows` of `task`, `metric`, `higher_is_better` and an estimate for each label."""
    if run.results is None or not run.results.get("benchmarks"):
        return None
    with as_written(run.folder / "results.json"):
        labels = list(run.results["models"])
        rows = [
            {name: row[name] for name in ("task", "metric", "higher_is_better")}
            | {"estimates": [row["models"].get(label) for label in labels]}
            for row in run.results["benchmarks"]
        ]
        return {"labels": labels, "rows": rows}


def data_table(run: Run) -> Json | None:
    """`splits`, `findings` and the pairs `shown` of the data check, reduced to what the page needs."""
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


def options_table(run: Run) -> list[tuple[str, list[Any]]]:
    """The `SHOWN_OPTIONS`, each with its value in every stage; None where a stage has no such option."""
    configs = [stage.config for stage in run.stages.values()]
    names = [name for name in SHOWN_OPTIONS if any(config.get(name) is not None for config in configs)]
    return [(name, [_shown(config.get(name)) for config in configs]) for name in names]


def _shown(value: Any) -> str | None:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else None if value is None else str(value)


def times(run: Run) -> list[tuple[str, int, str]]:
    """Each stage of the pipeline with its seconds and, for the judge, its cost."""
    with as_written(run.folder / "judge" / "usage.json"):
        cost = "not known" if run.usage is None or run.usage["cost"] is None else number(float(run.usage["cost"]))
    return [(name, seconds, cost if name == "judge" else "–") for name, seconds in run.seconds.items()]
