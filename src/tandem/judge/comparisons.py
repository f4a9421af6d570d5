"""Reads what is compared: two files of answers, or one file and the chosen answers of the data."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tandem.data.files import read_rows
from tandem.data.held_out import CHOSEN, chosen_answers
from tandem.data.messages import read_turns
from tandem.data.non_answers import non_answer, spoken
from tandem.data.rows import Row, RowError, TrackedRow, kind_of
from tandem.errors import UserError
from tandem.judge.options import JudgeOptions, label_of
from tandem.judge.requests import Comparison


class Answers(NamedTuple):
    """One side's answers."""

    file: Path
    label: str
    rows: Mapping[str, Mapping[str, Any]]  # by prompt id, in the file's order: prompt_id, messages, text and more


def load_comparisons(options: JudgeOptions, pairs: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The answers of both generation files, joined by prompt.

    Of a prompt that occurs twice in a file, the first answer counts, and a line says so.

    Answers are compared without their reasoning; one that is none (empty, cut off) is marked. Labels are what follows
    `generations_` in the files' names. With `--against chosen`, side 1 is the chosen answer of the held-out `pairs`.

    Raises:
        UserError: the folder or a file is missing, a row of it cannot be read, or the sides answer different prompts.
    """
    if options.run_dir is not None and not Path(options.run_dir).is_dir():
        raise UserError(f"--run_dir {options.run_dir}: no such folder")
    file_1, file_2 = options.generation_files
    if options.run_dir is not None and options.against == CHOSEN:
        return _against_chosen(read_answers(file_2, options.policy), chosen_answers(pairs))
    one, other = (read_answers(file, label_of(file)) for file in (file_1, file_2))
    return paired(one, other, list(one.rows))


def paired(one: Answers, other: Answers, keys: Sequence[str]) -> list[Comparison]:
    """The answers of two sides to the prompts `keys`, which are among both.

    Raises:
        UserError: they answer different prompts.
    """
    if differing := one.rows.keys() ^ other.rows.keys():
        raise UserError(f"{_both(one, other)}: {len(differing)} prompts are in one only; generate both on the same")
    return [_pair(one, other, key) for key in keys]


def _pair(one: Answers, other: Answers, key: str) -> Comparison:
    row_1, row_2 = one.rows[key], other.rows[key]
    if row_1["messages"] != row_2["messages"]:
        raise UserError(f"{_both(one, other)}: prompt {key} has other messages in each; generate both on the same")
    return Comparison(
        key,
        row_1["messages"],
        spoken(row_1["text"]),
        spoken(row_2["text"]),
        one.label,
        other.label,
        non_answer(row_1),
        non_answer(row_2),
    )


def _both(one: Answers, other: Answers) -> str:
    return f"{one.file} and {other.file}"


def _against_chosen(answers: Answers, chosen: Mapping[str, str]) -> list[Comparison]:
    if missing := answers.rows.keys() - chosen.keys():
        raise UserError(
            f"{answers.file}: {len(missing)} prompts are none of the held-out pairs; name those they are from"
        )
    return [
        Comparison(key, row["messages"], chosen[key], spoken(row["text"]), CHOSEN, answers.label, None, non_answer(row))
        for key, row in answers.rows.items()
    ]


def read_answers(file: Path, label: str) -> Answers:
    """A file of answers, which may be another program's, and end without a newline.

    Raises:
        UserError: there is no such file, or a row of it is no answer.
    """
    if file.is_dir():
        raise UserError(f"{file}: a folder; name a file of answers in it, as {file / 'generations_dpo.jsonl'}")
    if not file.is_file():
        others = sorted(map(label_of, file.parent.glob("generations_*.jsonl")))
        there = f"; there are answers of {', '.join(others)}" if others else ""
        raise UserError(f"{file}: no such file; generate answers first{there}")
    rows: dict[str, Mapping[str, Any]] = {}
    again = 0
    for number, row in read_rows(file):
        answer = _answer(row, f"{file} row {number}")
        again += answer["prompt_id"] in rows
        rows.setdefault(answer["prompt_id"], answer)
    if again:
        first = "the first answer to each is taken"
        tqdm.write(f"{file}: {again} rows answer prompts that an earlier row answers; {first}", file=sys.stderr)
    return Answers(file, label, rows)


def _answer(row: Row | RowError, where: str) -> Mapping[str, Any]:
    if isinstance(row, RowError):
        raise UserError(f"{where}: {row}")
    for field, kind in (("prompt_id", str), ("messages", list), ("text", str)):
        if field not in row:
            raise UserError(f"{where}: field {field!r} is missing: a row has prompt_id, messages and text")
        if not isinstance(row[field], kind):
            wanted = "a list of messages" if kind is list else "text"
            raise UserError(f"{where}: field {field!r} must be {wanted}, not {kind_of(row[field])}")
    if not row["messages"]:
        return row
    try:
        return row | {"messages": read_turns(TrackedRow(row), "messages")}
    except RowError as problem:
        raise UserError(f"{where}: {problem}") from None
