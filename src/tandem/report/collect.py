"""Reads a run folder for the report and the model card. What is missing is None or empty, never an error."""

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.data.non_answers import non_answer, spoken
from tandem.errors import UserError
from tandem.judge.requests import text_digest
from tandem.judge.verdicts import outcome
from tandem.runs import CONFIG, read_jsonl

Json = dict[str, Any]

STAGES = ("sft", "dpo")
PIPELINE = ("check", "sft", "merge_sft", "dpo", "merge_dpo", "evaluate", "compare", "judge", "report")
PIPELINE_LOG, ROUNDS_LOG = "dpo_pipeline_sanity.log", "rounds.log"
OUTCOMES = ("won", "lost", "tie", "disagree", "unjudged")
_STAGE_TIME = re.compile(r"^== (\w+): (\d+) s$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: its run.json, its config.yaml as text, its training metrics."""

    run: Json
    config_yaml: str | None
    metrics: Json | None

    @property
    def config(self) -> Json:
        """The options that the stage was run with."""
        return self.run.get("config") or {}


@dataclasses.dataclass(frozen=True)
class Run:
    """What was read from a run folder."""

    folder: Path
    stages: dict[str, Stage] = dataclasses.field(default_factory=dict)
    results: Json | None = None
    comparison: Json | None = None
    judge: Json | None = None  # judge_summary.json
    usage: Json | None = None  # judge/usage.json
    others_judged: dict[str, Json] = dataclasses.field(default_factory=dict)  # <name>_summary.json of other judgements
    data: Json | None = None  # data_report.json
    answers: list[Json] = dataclasses.field(default_factory=list)
    unmatched_verdicts: int = 0  # verdicts of another judge, or on answers other than those shown
    seconds: dict[str, int] = dataclasses.field(default_factory=dict)
    commands: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # of the pipeline's stages, as words
    alarms: list[Json] = dataclasses.field(default_factory=list)
    rounds: Json | None = None  # rounds.json

    @property
    def is_of_rounds(self) -> bool:
        """Whether rounds.sh wrote the folder; then trainings and answers are in the folders of its rounds."""
        return self.rounds is not None and not any((self.stages, self.results, self.judge, self.answers))

    @property
    def labels(self) -> list[str]:
        """The columns of the side-by-side view, in `column_order`."""
        return column_order({label for row in self.answers for label in row["answers"]})


def column_order(labels: Collection[str]) -> list[str]:
    """Labels in the order that every page has: models as they were trained, other models, the data's own answer."""
    known = ("base", "sft", "dpo")
    others = sorted(set(labels) - {*known, "chosen"})
    return [label for label in (*known, *others, "chosen") if label in labels]


def read_run(folder: str | Path) -> Run:
    """Read everything in a run folder that the report shows.

    Raises:
        UserError: there is no such folder, it holds nothing of a run, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--run_dir {folder}: no such folder")
    comparison = read_json(folder / "dpo_comparison_results.json")
    judge = read_json(folder / "judge_summary.json")
    records = _read_jsonl(folder / "judge" / "verdicts.jsonl")
    answers, unmatched = _judged(_side_by_side(folder, comparison), judge, records, folder)
    run = Run(
        folder=folder,
        stages={name: stage for name in STAGES if (stage := _stage(folder / name)) is not None},
        results=read_json(folder / "results.json"),
        comparison=comparison,
        judge=judge,
        usage=read_json(folder / "judge" / "usage.json"),
        others_judged=_others_judged(folder),
        data=read_json(folder / "data_report.json"),
        answers=answers,
        unmatched_verdicts=unmatched,
        seconds=_stage_seconds(folder / PIPELINE_LOG) or _stage_seconds(folder / ROUNDS_LOG),
        commands=_commands(folder / ".stages"),
        alarms=_read_jsonl(folder / "dpo" / "logs" / "alarms.jsonl"),
        rounds=read_json(folder / "rounds.json"),
    )
    if not any((run.stages, run.results, run.judge, run.data, run.answers, run.rounds)):
        raise UserError(
            f"--run_dir {folder}: nothing of a run in it (no results.json, dpo_comparison_results.json, rounds.json, "
            "sft/, dpo/ …)"
        )
    return run


def _others_judged(folder: Path) -> dict[str, Json]:
    """Summaries of judgements other than judge/'s, as judge_vs_chosen_summary.json, by the name of their folder."""
    found = {}
    for path in sorted(folder.glob("*_summary.json")):
        summary = read_json(path)
        if path.name != "judge_summary.json" and isinstance(summary, dict) and "conclusion" in summary:
            found[path.name.removesuffix("_summary.json")] = summary
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is none. NaN and infinities, which JSON lacks, become None.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run its stage again") from error


def _read_jsonl(path: Path) -> list[Json]:
    try:
        return read_jsonl(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run its stage again") from error


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Within the block, a KeyError and the like mean that `path` does not have the form that Tandem writes.

    Raises:
        UserError: in place of such an error, naming `path`.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not as this version of Tandem writes it ({error!r}); run its stage again") from error


def _stage(folder: Path) -> Stage | None:
    run, metrics = read_json(folder / "run.json"), read_json(folder / "training_metrics.json")
    config = folder / CONFIG
    config_yaml = config.read_text(encoding="utf-8") if config.is_file() else None
    if run is None and metrics is None and config_yaml is None:
        return None
    return Stage(run or {}, config_yaml, metrics)


def _stage_seconds(log: Path) -> dict[str, int]:
    """The seconds that the last completed run of each stage took, in the order of the log."""
    if not log.is_file():
        return {}
    text = log.read_text(encoding="utf-8", errors="replace")
    return {name: int(seconds) for name, seconds in _STAGE_TIME.findall(text)}


def _commands(folder: Path) -> dict[str, list[str]]:
    """The command of each stage, as `stage` of pipelines/lib.sh wrote it down.

    Those of the sanity pipeline are in its order; other stages follow in the order in which they began.
    """
    found = {}
    for path in sorted(folder.glob("*.command"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        with as_written(path):
            found[path.stem] = shlex.split(path.read_text(encoding="utf-8"))
    known = [name for name in PIPELINE if name in found]
    return {name: found[name] for name in dict.fromkeys([*known, *found])}


def _side_by_side(folder: Path, comparison: Json | None) -> list[Json]:
    """Rows of `prompt_id`, `messages`, `answers` by label, and `non_answers`: by label, why an answer is none.

    They are read from the comparison, else from the files of answers.
    """
    if comparison is not None:
        with as_written(folder / "dpo_comparison_results.json"):
            return [
                {
                    "prompt_id": row["prompt_id"],
                    "messages": row["messages"],
                    "answers": {**row["answers"], **({"chosen": row["chosen"]} if row.get("chosen") else {})},
                    "non_answers": row.get("non_answers", {}),
                }
                for row in comparison["comparisons"]
            ]
    rows: dict[str, Json] = {}
    for path in sorted(folder.glob("generations_*.jsonl")):
        label = path.stem.removeprefix("generations_")
        with as_written(path):
            for record in _read_jsonl(path):
                row = {"prompt_id": record["prompt_id"], "messages": record["messages"], "answers": {}}
                row = rows.setdefault(record["prompt_id"], row | {"non_answers": {}})
                row["answers"][label] = spoken(record["text"])
                if why := non_answer(record):
                    row["non_answers"][label] = why
    return list(rows.values())


def _judged(
    rows: Sequence[Json], summary: Json | None, records: Iterable[Json], folder: Path
) -> tuple[list[Json], int]:
    """The rows with their `outcome` and `verdicts`, and how many verdicts belong to none of them.

    Lines are only ever added to verdicts.jsonl, so that it may hold verdicts of another judge, or on answers that were
    replaced since. winners.json says which verdicts count.
    """
    main = [record for record in records if record.get("kind") == "main"]
    if summary is None:
        return [row | {"outcome": "unjudged", "verdicts": []} for row in rows], len(main)
    by_key: dict[str, Json] = {}
    for record in main:
        if by_key.get(record["key"], {}).get("status") != "ok":
            by_key[record["key"]] = record
    with as_written(folder / "judge_summary.json"):
        labels = summary["labels"]["side_1"], summary["labels"]["side_2"]
    with as_written(folder / "judge" / "winners.json"):
        asked = {row["prompt_id"]: row for row in read_json(folder / "judge" / "winners.json") or []}
        keys = {row["prompt_id"]: _keys(row, asked.get(row["prompt_id"]), labels) for row in rows}
    matched = {key for row_keys in keys.values() for key in row_keys} & by_key.keys()
    with as_written(folder / "judge" / "verdicts.jsonl"):
        judged = [row | _verdicts(keys[row["prompt_id"]], by_key) for row in rows]
    return judged, len(by_key) - len(matched)


def _keys(row: Json, asked: Json | None, labels: tuple[str, str]) -> list[str]:
    """The keys of the verdicts on a row's answers; none if the verdicts are on other answers than the row shows."""
    shown = [row["answers"].get(label) for label in labels]
    if asked is None or None in shown or [text_digest(text) for text in shown] != asked.get("answers"):
        return []
    return list(asked["calls"])


def _verdicts(keys: Sequence[str], by_key: Mapping[str, Json]) -> Json:
    found = [by_key[key] for key in keys if key in by_key]
    return {"outcome": outcome(found), "verdicts": [_shown(record) for record in found]}


def _shown(record: Json) -> Json:
    named = {"A": record["a"], "B": record["b"], "tie": "tie"}.get(record["verdict"])
    text = record["rationale"] or record["detail"]
    return {"first": record["a"], "second": record["b"], "named": named, "status": record["status"], "text": text}
