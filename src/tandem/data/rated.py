"""Several rated or ranked answers to a prompt → preference pairs: rows as UltraFeedback and Nectar have them.

A rated row has a list of answers, objects with a text and a score or rank (`completions` of UltraFeedback, `answers` of
Nectar), or texts beside a list of scores. Each pair is a row with `chosen`, `rejected`, their scores, and all that the
rated row has besides.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tandem.data import select
from tandem.data.columns import PROMPTS
from tandem.data.options import DataOptions
from tandem.data.rows import Row, RowError, has_value, kind_of, shorten
from tandem.data.scores import number
from tandem.data.splits import Located
from tandem.errors import UserError
from tandem.ranks import tell_once
from tandem.runs import sha256_json

_ANSWERS = ("completions", "answers", "responses", "generations", "candidates")
_TEXTS = ("response", "answer", "text", "content", "completion", "generation")
_SCORES = ("score", "overall_score", "fine-grained_score", "rating", "reward", "rank")
_LISTS_OF_SCORES = ("scores", "ratings", "rewards", "ranks", "score", "rating", "reward", "rank")


def paired(located: Iterable[Located], options: DataOptions, split: str) -> list[Located]:
    """The rows, with each rated row replaced by its pairs; a line on stderr says how many pairs prompts gave.

    Raises:
        UserError: options for rated rows, and there are none; no rated row gives a pair.
    """
    rows: list[Located] = []
    gave: Counter[int] = Counter()
    without: Counter[str] = Counter()
    is_rated, unused = False, 0
    for source, number_, row in located:
        column = answers_column(row) if isinstance(row, dict) else None
        if column is None or not isinstance(row, dict):
            rows.append((source, number_, row))
            continue
        is_rated = True
        try:
            pairs, in_pairs, why = _pairs(row, column, options)
        except RowError as error:
            rows.append((source, number_, error))
            continue
        rows += [(source, number_, pair) for pair in pairs]
        gave[len(pairs)] += 1
        unused += len(row[column]) - in_pairs
        if why:
            without[why] += 1
    where = f"{options.dataset_name} ({split})"
    if gave:
        _tell(where, gave, without, unused)
        if not rows:
            raise UserError(f"{where}: none of its {gave.total()} rated prompts gives a pair: {_counts(without)}")
    elif not is_rated:
        for name in ("pair_strategy", "score_key"):
            if getattr(options, name) is not None and rows:
                raise UserError(f"--{name} has no effect: {where} has no rows with several rated or ranked answers")
    return rows


def _tell(where: str, gave: Counter[int], without: Counter[str], unused: int) -> None:
    pairs = sum(count * prompts for count, prompts in gave.items())
    each = [f"{_plural(count, 'pair')} from {_plural(gave[count], 'prompt')}" for count in sorted(gave) if count]
    each += [f"none from {_plural(gave[0], 'prompt')} ({_counts(without)})"] if gave[0] else []
    told = f"{where}: {_plural(pairs, 'pair')} of {_plural(gave.total(), 'prompt')} with rated answers"
    tell_once(f"{told}: {', '.join(each)}" + (f"; {_plural(unused, 'answer')} in no pair" if unused else ""))


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counts(without: Counter[str]) -> str:
    return ", ".join(f"{why} {count}" for why, count in without.most_common())


def answers_column(row: Row) -> str | None:
    """The column of a row's several answers; None for a row that is a pair already, or has no such column."""
    if has_value(row.get("chosen")) or has_value(row.get("rejected")):
        return None
    return next((name for name in _ANSWERS if isinstance(row.get(name), list) and row[name]), None)


def _pairs(row: Row, column: str, options: DataOptions) -> tuple[list[Row], int, str | None]:
    """The pairs of a rated row, how many of its answers are in one, and why there is none."""
    read = [_text(answer, f"field {column!r}, answer {index}") for index, answer in enumerate(row[column], 1)]
    texts = [text for text, _ in read]
    scores, used, inside = _scores(row, column, options.score_key)
    scores = [score if text.strip() else None for score, text in zip(scores, texts, strict=True)]
    strategy = options.pair_strategy or select.BEST_WORST
    most = 2**31 if strategy == select.ALL else 1
    selection = select.Selection(strategy, options.min_score_margin or 0.0, most)
    seed = f"{options.data_seed} {sha256_json([[row.get(name) for name in PROMPTS], texts])}"
    lengths = list(map(len, texts))
    found, why = select.select(scores, lengths, selection, seed, lambda one, other: texts[one] == texts[other])
    taken = (column, "chosen", "rejected") if inside else (column, used, "chosen", "rejected")
    rest = {name: value for name, value in row.items() if name not in taken}
    rest |= dict(_besides(row[column], column, [{key, used} if inside else {key} for _, key in read]))
    return (
        [
            rest
            | {"chosen": texts[best], "rejected": texts[worst]}
            | {"score_chosen": scores[best], "score_rejected": scores[worst]}
            for best, worst in found
        ],
        len({index for pair in found for index in pair}),
        why,
    )


def _text(answer: Any, where: str) -> tuple[str, str]:
    """The text of one answer, and the key that it has."""
    if isinstance(answer, str):
        return answer, ""
    if not isinstance(answer, dict):
        raise RowError(f"{where}: must be text or an object, not {kind_of(answer)}")
    name = next((name for name in _TEXTS if name in answer), None)
    if name is None:
        raise RowError(f"{where}: has none of {', '.join(_TEXTS)}")
    if not isinstance(answer[name], str):
        raise RowError(f"{where}: {name!r} must be text, not {kind_of(answer[name])}")
    return answer[name], name


def _scores(row: Row, column: str, key: str | None) -> tuple[list[float | None], str, bool]:
    """A score for each answer, higher for better, its name, and whether that is a key of the answers or a column.

    A rank counts from the best, so it is negated.

    Raises:
        RowError: no scores, or not one for each answer.
    """
    answers = row[column]
    inside = [name for name in ([key] if key else _SCORES) if _has(answers, name)]
    beside = [name for name in ([key] if key else _LISTS_OF_SCORES) if isinstance(row.get(name), list)]
    if inside:
        name = inside[0]
        values = [answer.get(name) for answer in answers]
    elif beside:
        name = beside[0]
        values = row[name]
        if len(values) != len(answers):
            raise RowError(f"field {name!r}: has {len(values)} scores for {len(answers)} answers in {column!r}")
    else:
        known = f"no {key}" if key else f"neither scores ({', '.join(_SCORES[:-1])}) nor ranks"
        raise RowError(f"field {column!r}: its answers have {known}; name the key with --score_key")
    sign = -1 if "rank" in name.lower() else 1
    found = [number(value) for value in values]
    return [None if value is None else sign * value for value in found], name, bool(inside)


def _has(answers: list[Any], name: str) -> bool:
    return any(isinstance(answer, dict) and number(answer.get(name)) is not None for answer in answers)


def _besides(answers: list[Any], column: str, taken: list[set[str]]) -> Iterator[tuple[str, Any]]:
    """What the answers have besides text and score, whose keys each has in `taken`: name → the first value."""
    told: set[str] = set()
    for answer, own in zip(answers, taken, strict=True):
        for name, value in answer.items() if isinstance(answer, dict) else ():
            if name not in own | told and has_value(value):
                told.add(name)
                yield f"{column}[].{shorten(name)}", value
