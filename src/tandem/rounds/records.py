"""The files of a round's answers: a line for each answer, with its prompt, and after scoring with its score.

    prompts.jsonl   prompt_id, messages, row (the data's own row, for a function that scores)
    samples.jsonl   prompt_id, messages, text, label, draw, n_tokens, finish_reason, model, adapter, sampling, …
    scores.jsonl    the same, with score, scorer, scores (by scorer) and non_answer

Files of other programs are read as well, if their lines have a prompt, `text`, and for pairs `score`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tandem.data.files import read_rows
from tandem.data.formats import Asked, Message, RowError, as_messages, kind_of, prompt_id
from tandem.errors import UserError
from tandem.runs import read_jsonl, write_atomic

Record = dict[str, Any]
Key = tuple[str, str, int]  # label, prompt id, number of the draw

_ROLES = ("system", "user", "assistant", "tool")


def check_there(path: str | Path) -> None:
    """Refuse a path that is not a file.

    Raises:
        UserError: naming it.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")


def read_records(path: str | Path, *, scored: bool = False) -> list[Record]:
    """The lines of `samples.jsonl`, or of `scores.jsonl` if `scored`, checked, and completed where fields are missing.

    A record has `prompt_id`, `messages`, `text`, `label`, `draw` and, if `scored`, `score`, a finite number or None.

    Raises:
        UserError: naming the file, row and field that is wrong.
    """
    check_there(path)
    path = Path(path)
    records: list[Record] = []
    seen: dict[Key, int] = {}
    draws: dict[tuple[str, str], int] = {}
    for number, row in read_rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            record = _checked(row, scored)
            own = record["label"], record["prompt_id"]
            draws[own] = draws.get(own, -1) + 1
            record.setdefault("draw", draws[own])
            if not isinstance(record["draw"], int) or isinstance(record["draw"], bool):
                raise RowError(f"field 'draw': must be a whole number, not {kind_of(record['draw'])}")
            if (first := seen.setdefault(key_of(record), number)) != number:
                raise RowError(f"the draw {record['draw']} of {record['label']} for this prompt is in row {first}")
        except RowError as error:
            raise UserError(f"{path} row {number}: {error}") from None
        records.append(record)
    if not records:
        raise UserError(f"{path}: has no answers")
    return records


def key_of(record: Mapping[str, Any]) -> Key:
    """The key that identifies an answer in a file."""
    return record["label"], record["prompt_id"], record["draw"]


def _checked(row: Mapping[str, Any], scored: bool) -> Record:
    messages = Asked(_messages(row), row)
    if not isinstance(row.get("text"), str):
        raise RowError(f"field 'text': the answer must be text, not {kind_of(row.get('text'))}")
    label = row.get("label", "policy")
    if not isinstance(label, str):
        raise RowError(f"field 'label': must be text, not {kind_of(label)}")
    tokens = row.get("n_tokens")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0):
        raise RowError(f"field 'n_tokens': must be a count, not {tokens!r}"[:200])
    reason = row.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise RowError(f"field 'finish_reason': must be text, not {kind_of(reason)}")
    record = {**row, "messages": messages, "prompt_id": prompt_id(messages), "label": label}
    return record | {"score": _score(row)} if scored else record


def _messages(row: Mapping[str, Any]) -> list[Message]:
    prompt = row.get("messages", row.get("prompt"))
    if isinstance(prompt, str) and prompt.strip():
        return as_messages(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise RowError(f"field 'messages': must be the prompt, a list of messages or text, not {kind_of(prompt)}")
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError(f"field 'messages', message {number}: must be an object with 'role' and 'content'")
        if message.get("role") not in _ROLES:
            raise RowError(f"field 'messages', message {number}: 'role' must be one of {', '.join(_ROLES)}")
    return prompt


def _score(row: Mapping[str, Any]) -> float | None:
    if "score" not in row:
        raise RowError("column 'score' is missing; score the answers first (scripts/score.py)")
    score = row["score"]
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise RowError(f"field 'score': must be a number or null, not {kind_of(score)}")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise RowError("field 'score': is not finite; an answer without a score has null")
    return value


def read_prompt_ids(path: Path) -> set[str]:
    """The ids of the prompts in a `prompts.jsonl`.

    Raises:
        UserError: the file is missing, empty or damaged.
    """
    try:
        found = {record["prompt_id"] for record in read_jsonl(path)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r})") from error
    if not found:
        raise UserError(f"{path}: no such file, or nothing in it")
    return found


def by_prompt(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records in their order, by prompt id."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["prompt_id"], []).append(record)
    return groups


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of records, whole or not at all."""
    # A lone surrogate, which JSON may hold, cannot be encoded as UTF-8
    lines = (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_atomic(path, "".join(lines).encode(errors="replace"))


def _plain(value: Any) -> Any:
    """`value` as what JSON can hold: a column of a data set may hold dates, bytes or NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
