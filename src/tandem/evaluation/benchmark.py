"""Tasks of lm-evaluation-harness on the reference and the policies. The harness is in the extra `benchmark`.

Two tasks need no download, since their data is made here: `tandem_sums` (which of four numbers is the sum, by
log-likelihood) and `tandem_words` (say a word n times, by exact match). A model of a few hundred million weights gets
about half of them right: they show whether training broke that, and nothing about how good a model is.
"""

import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem import contract, ranks
from tandem.errors import UserError, first_line
from tandem.intervals import LEVEL, Estimate, estimate, wilson
from tandem.options.fields import opt
from tandem.options.rules import Options

PACKAGE = "lm_eval"
RESAMPLES = 1000  # bootstrap samples for metrics whose standard error has no formula
QUESTIONS = 200
_WORDS = "lamp river stone paper green north apple seven cloud bread".split()  # noqa: SIM905


@dataclass
class BenchmarkOptions(Options):
    """Benchmark."""

    benchmark: list[str] | None = opt(
        None, "tasks of lm-evaluation-harness to run on every model; tandem_sums and tandem_words need no download"
    )
    benchmark_limit: int | None = opt(None, "ask only the first N questions of a task", low=1, needs="benchmark!=none")
    benchmark_tasks: str | None = opt(None, "folder with tasks of your own, as YAML files", needs="benchmark!=none")
    benchmark_fewshot: int | None = opt(
        None, "examples before each question; unset: as many as the task says", low=0, needs="benchmark!=none"
    )
    benchmark_chat: bool = opt(False, "put each question through the chat template", needs="benchmark!=none")

    def conflicts(self) -> Iterator[str]:
        if self.benchmark and importlib.util.find_spec(PACKAGE) is None:
            yield f"--benchmark needs lm-evaluation-harness: {contract.extra('benchmark')}"
        if self.benchmark_tasks is not None and not Path(self.benchmark_tasks).is_dir():
            yield f"--benchmark_tasks {self.benchmark_tasks}: no such folder"


def check_tasks(options: BenchmarkOptions) -> None:
    """Look the tasks up before anything is measured.

    Raises:
        UserError: there is no task of that name, or this is one of several processes.
    """
    if not options.benchmark:
        return
    ranks.refuse_several("--benchmark")
    known = _manager(options).all_tasks
    for name in options.benchmark:
        if name not in known and name not in own_tasks():
            raise UserError(f"--benchmark {name}: no such task; `lm_eval ls tasks` lists them")


def run_benchmarks(options: BenchmarkOptions, models: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """A row for each task and metric: `task`, `metric`, `higher_is_better` and `models`, an estimate by label.

    Args:
        models: by label, a function that loads a model and its tokenizer; only one is in memory at a time

    Raises:
        UserError: a task cannot be run, for example because its data cannot be downloaded.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for label, load in models.items():
        model, tokenizer = load()
        for task, metric, better, value in _metrics(options, model, tokenizer, batch_size):
            row = rows.setdefault((task, metric), {"task": task, "metric": metric, "higher_is_better": better})
            row.setdefault("models", {})[label] = value
        del model, tokenizer
    return list(rows.values())


def _manager(options: BenchmarkOptions) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=options.benchmark_tasks)


def _metrics(
    options: BenchmarkOptions, model: Any, tokenizer: Any, batch_size: int
) -> Iterator[tuple[str, str, bool, Estimate]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    own = own_tasks()
    tasks = [own.get(name, name) for name in options.benchmark or []]
    try:
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device)),
            tasks=tasks,
            num_fewshot=options.benchmark_fewshot,
            limit=options.benchmark_limit,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            apply_chat_template=options.benchmark_chat,
            task_manager=_manager(options),
        )
    except Exception as error:  # a missing data set, an error in a task's own code: the harness passes all on
        raise UserError(f"--benchmark {' '.join(options.benchmark or [])}: {first_line(error)}") from error
    for task, values in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for name, value in values.items():
            metric, _, how = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            noise = values.get(f"{metric}_stderr,{how}")
            better = bool(found.get("higher_is_better", {}).get(task, {}).get(metric, True))
            shown = metric if how in ("", "none") else f"{metric} ({how})"
            yield task, shown, better, task_estimate(float(value), noise, counts.get("effective", 0))


def task_estimate(value: float, error: Any, count: int) -> Estimate:
    """A task's `value` over `count` questions, with an interval from the harness's standard `error`."""
    if not isinstance(error, int | float):
        return estimate(value, None, None, count, "the task has no standard error of it")
    if count > 1 and abs(error**2 * (count - 1) - value * (1 - value)) < 1e-9:  # a mean of zeros and ones
        return wilson(value * count, count, "the task has no question")
    from scipy.stats import norm

    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    return estimate(value, value - reach, value + reach, count)


def own_tasks() -> dict[str, dict[str, Any]]:
    """The tasks whose data is made here, in the harness's form."""
    common = {"test_split": "test", "num_fewshot": 0, "metadata": {"version": 1.0}}
    return {
        "tandem_sums": common
        | {
            "task": "tandem_sums",
            "custom_dataset": lambda **_: _dataset(sums()),
            "output_type": "multiple_choice",
            "doc_to_text": "Question: What is {{a}} plus {{b}}?\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "tandem_words": common
        | {
            "task": "tandem_words",
            "custom_dataset": lambda **_: _dataset(repetitions()),
            "output_type": "generate_until",
            "doc_to_text": "Say the word yes 2 times: yes yes\nSay the word {{word}} {{times}} times:",
            "doc_to_target": "target",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
            ],
        },
    }


def _dataset(rows: Sequence[Mapping[str, Any]]) -> Any:
    import datasets

    return datasets.DatasetDict({"test": datasets.Dataset.from_list(list(rows))})


def sums() -> list[dict[str, Any]]:
    """Sums of two numbers below 50: `a`, `b`, `choices` (the sum and three numbers near it) and the right `label`."""
    draw, rows = random.Random(1), []
    for _ in range(QUESTIONS):
        a, b = draw.randrange(50), draw.randrange(50)
        wrong = draw.sample([a + b + near for near in (-10, -2, -1, 1, 2, 10) if a + b + near >= 0], 3)
        choices = [str(number) for number in draw.sample([a + b, *wrong], 4)]
        rows.append({"a": a, "b": b, "choices": choices, "label": choices.index(str(a + b))})
    return rows


def repetitions() -> list[dict[str, Any]]:
    """Words to repeat: `word`, how many `times`, and the `target`."""
    draw, rows = random.Random(2), []
    for _ in range(QUESTIONS):
        word, times = draw.choice(_WORDS), draw.randrange(2, 6)
        rows.append({"word": word, "times": times, "target": " ".join([word] * times)})
    return rows
