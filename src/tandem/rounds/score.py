"""Scores each answer by one or several scorers, and keeps each score as it comes."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tandem import ranks
from tandem.data.formats import Message
from tandem.data.non_answers import non_answer, spoken
from tandem.errors import UserError
from tandem.rounds.names import PROMPTS, SCORES, SCORES_REPORT
from tandem.rounds.options import ScoreOptions
from tandem.rounds.records import Record, by_prompt, read_records, write_records
from tandem.runs import append_jsonl, locked, read_jsonl, sha256_json, write_json

CACHE = "scores_cache.jsonl"

Text = tuple[Sequence[Message], str]
Found = Iterator[tuple[int, float | None, str]]


def score(options: ScoreOptions) -> dict[str, Any]:
    """Write `scores.jsonl` and its report to `output_dir`; returns the report.

    A scorer is asked once for each text, and a run after a kill asks only what is missing: scores are kept in
    scores_cache.jsonl under a digest of the scorer, the prompt, the answer and, for a function, the row.

    Raises:
        UserError: the samples cannot be read, or a scorer cannot be used.
    """
    ranks.refuse_several("score")
    records = read_records(options.samples)
    rows = _rows(Path(options.samples).with_name(PROMPTS))
    reasons = [non_answer(record) for record in records]
    whole = [record for record, why in zip(records, reasons, strict=True) if why is None]
    folder = Path(options.output_dir)
    with locked(folder):
        cache = Cache(folder / CACHE)
        by_scorer: dict[str, list[tuple[float | None, str]]] = {}
        details: list[dict[str, Any]] = [{} for _ in whole]
        for name in options.reward_models:
            by_scorer[f"reward:{name}"] = _reward(options, name, whole, cache)
        for name in options.score_function:
            by_scorer[f"function:{name}"] = _function(name, whole, rows, cache)
        if options.judge_model:
            by_scorer[f"judge:{options.judge_model}"] = _judge(options, whole, cache, folder, details)
        _refuse_failed(by_scorer)
        found = iter(_combined(options, by_scorer, details))
        out = [
            record | {"score": None, "scorer": None, "scores": {}, "non_answer": why}
            if why is not None
            else record | {"non_answer": None} | next(found)
            for record, why in zip(records, reasons, strict=True)
        ]
        report = _report(out, by_scorer)
        write_json(folder / SCORES_REPORT, report)
        write_records(folder / SCORES, out)
    return report


def _refuse_failed(by_scorer: dict[str, list[tuple[float | None, str]]]) -> None:
    """Refuse a scorer that failed on every answer.

    Raises:
        UserError: naming the scorer and the reason.
    """
    for name, values in by_scorer.items():
        failed = [why for value, why in values if value is None and why.startswith(("error:", "not_finite", "no_mark"))]
        if values and len(failed) == len(values):
            raise UserError(f"{name}: gave none of {len(values)} answers a score: {failed[0]}")


class Cache:
    """Scores by a digest of what the scorer was asked.

    That a judge gave no mark is kept only during the run: another run, with a higher limit of tokens, may get one.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            records = read_jsonl(file)
            self._known = {
                record["key"]: (record["score"], record["why"]) for record in records if record["why"] != "no_mark"
            }
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: damaged ({error!r}); move it away, and the answers are scored anew") from error

    def get(self, keys: Sequence[str], ask: Callable[[list[int]], Found], label: str) -> list[tuple[float | None, str]]:
        """The score of each key. `ask` gets the indices of those that are missing, of equal keys only the first."""
        from tqdm import tqdm

        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, index)
        missing = list(first.values())
        if missing:
            with tqdm(total=len(missing), desc=label, unit="answer") as bar:
                for index, value, why in ask(missing):
                    if not why.startswith("no_mark"):
                        append_jsonl(self._file, {"key": keys[index], "score": value, "why": why})
                    self._known[keys[index]] = (value, why)
                    bar.update()
        return [self._known[key] for key in keys]


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return {record["prompt_id"]: record["row"] for record in read_jsonl(file)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r})") from error


def _texts(records: Sequence[Record]) -> list[Text]:
    """Prompts and answers without their reasoning, which is not scored."""
    return [(record["messages"], spoken(record["text"])) for record in records]


def _reward(
    options: ScoreOptions, name: str, records: Sequence[Record], cache: Cache
) -> list[tuple[float | None, str]]:
    identity = ["reward", name, _weights(name), options.reward_dtype]
    texts = _texts(records)

    def ask(missing: list[int]) -> Found:
        from tandem.rounds.reward import RewardModel

        model = RewardModel(name, options.reward_dtype, options.reward_batch_size)
        for index, value, why in model.scores([texts[at] for at in missing]):
            yield missing[index], value, why

    return cache.get([sha256_json([identity, *text]) for text in texts], ask, f"scores of {name}")


def _weights(name: str) -> Any:
    """What tells apart two models in a folder of one name: names, sizes and times of its files. None for a Hub name."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    return sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file()
    )


def _function(
    name: str, records: Sequence[Record], rows: dict[str, dict[str, Any]], cache: Cache
) -> list[tuple[float | None, str]]:
    from tandem.rounds.functions import Function

    function = Function(name)
    own = [rows.get(record["prompt_id"], {}) for record in records]
    texts = _texts(records)
    keys = [
        sha256_json([["function", function.name, function.version], *text, row])
        for text, row in zip(texts, own, strict=True)
    ]
    return cache.get(
        keys,
        lambda missing: ((at, *function.score(*texts[at], own[at])) for at in missing),
        f"scores of {function.name}",
    )


def _judge(
    options: ScoreOptions, records: Sequence[Record], cache: Cache, folder: Path, details: list[dict[str, Any]]
) -> list[tuple[float | None, str]]:
    with _named_as_given():
        return _judged(options, records, cache, folder, details)


@contextlib.contextmanager
def _named_as_given() -> Iterator[None]:
    """Within the block, errors about `--base_url` are raised with the name that the option has here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--base_url", "--judge_base_url")) from error


def _judged(
    options: ScoreOptions, records: Sequence[Record], cache: Cache, folder: Path, details: list[dict[str, Any]]
) -> list[tuple[float | None, str]]:
    from tandem.rounds import judged

    if options.judge_mode == "rubric":
        rubric = Path(options.rubric).read_text(encoding="utf-8", errors="replace") if options.rubric else judged.RUBRIC
        identity = ["judge", options.judge_model, options.judge_base_url, rubric, options.judge_temperature]
        texts = _texts(records)

        def ask(missing: list[int]) -> Found:
            for index, value, why in judged.mark(options, [texts[at] for at in missing]):
                yield missing[index], value, why

        return cache.get([sha256_json([identity, *text]) for text in texts], ask, "marks")
    if options.judge_against:
        return _against(options, records, folder)
    answers = {
        key: (group[0]["messages"], list(dict.fromkeys(spoken(record["text"]) for record in group)))
        for key, group in by_prompt(list(records)).items()
    }
    several = {key: group for key, group in answers.items() if len(group[1]) > 1}
    found = judged.compare(options, folder, several) if several else {}
    scores: list[tuple[float | None, str]] = []
    for index, record in enumerate(records):
        key = record["prompt_id"]
        if key not in found:
            scores.append((None, "alone"))  # a strength is relative to other answers to the prompt
            continue
        own = found[key][answers[key][1].index(spoken(record["text"]))]
        details[index]["strength"] = own
        scores.append((own["value"], "") if own["n"] else (None, "unjudged"))
    return scores


def _against(options: ScoreOptions, records: Sequence[Record], folder: Path) -> list[tuple[float | None, str]]:
    """Compare each answer with the first whole answer to its prompt in the other file.

    Where that file has only answers that are none (empty, cut off), the answer is better without asking.
    """
    from tandem.rounds import judged

    base: dict[str, str] = {}
    without: set[str] = set()
    for record in read_records(str(options.judge_against)):
        if non_answer(record) is None:
            base.setdefault(record["prompt_id"], spoken(record["text"]))
        else:
            without.add(record["prompt_id"])
    texts = [(record["prompt_id"], *text) for record, text in zip(records, _texts(records), strict=True)]
    found = iter(judged.against(options, folder, [text for text in texts if text[0] in base], base))
    scores: list[tuple[float | None, str]] = []
    for key, _, _ in texts:
        points = next(found) if key in base else 1.0 if key in without else None
        scores.append((points, "") if points is not None else (None, "unjudged" if key in base else "alone"))
    return scores


def _combined(
    options: ScoreOptions, by_scorer: dict[str, list[tuple[float | None, str]]], details: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """For each answer its score by each scorer, and the score by which answers are ranked."""
    rewards = [name for name in by_scorer if name.startswith("reward:")]
    joined = options.reward_combine if len(rewards) > 1 and not options.rank_by else "each"
    for index, detail in enumerate(details):
        scores = {name: values[index][0] for name, values in by_scorer.items()}
        whys = {name: values[index][1] for name, values in by_scorer.items() if values[index][1]}
        ranking = options.rank_by or next(iter(by_scorer))
        if joined != "each":
            own = [scores[name] for name in rewards]
            known = [value for value in own if value is not None]
            ranking = f"reward:{joined}"
            scores[ranking] = None
            if len(known) == len(own):
                scores[ranking] = statistics.fmean(known) if joined == "mean" else min(known)
        yield (
            {"score": scores[ranking], "scorer": ranking, "scores": scores}
            | ({"unscored": whys} if whys else {})
            | detail
        )


def _report(records: Sequence[Record], by_scorer: dict[str, list[tuple[float | None, str]]]) -> dict[str, Any]:
    labels = list(dict.fromkeys(record["label"] for record in records))

    def mean(label: str, name: str) -> float | None:
        values = [record["scores"].get(name) for record in records if record["label"] == label]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    return {
        "answers": len(records),
        "scored": sum(record["score"] is not None for record in records),
        "scorer": next((record["scorer"] for record in records if record["scorer"]), None),
        "non_answers": dict(Counter(record["non_answer"] for record in records if record["non_answer"]).most_common()),
        "unscored": {
            name: dict(Counter(why for _, why in values if why).most_common(20)) for name, values in by_scorer.items()
        },
        "means": {label: {name: mean(label, name) for name in names} for label in labels},
    }


def to_markdown(report: dict[str, Any]) -> str:
    """A few lines on how many answers have a score, why others have none, and the means by label."""
    lines = [f"{report['scored']} of {report['answers']} answers scored by {report['scorer']}"]
    told = [f"{why} {count}" for why, count in report["non_answers"].items()]
    lines += [f"no answers: {', '.join(told)}"] if told else []
    for name, whys in report["unscored"].items():
        lines += (
            [f"without a score of {name}: {', '.join(f'{why} {count}' for why, count in whys.items())}"] if whys else []
        )
    for label, means in report["means"].items():
        known = [f"{name} {value:.4g}" for name, value in means.items() if value is not None]
        lines.append(f"mean of {label}: {', '.join(known) or 'none'}")
    return "\n".join(lines)
