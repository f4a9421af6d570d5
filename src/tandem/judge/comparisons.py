"""What is compared: two files of answers, or one against the data's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.data.held_out import CHOSEN, chosen_answers
from tandem.data.non_answers import non_answer, spoken
from tandem.errors import UserError
from tandem.judge.log import read_log
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Comparison


def load_comparisons(options: JudgeOptions, pairs: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The answers of both generation files, joined by prompt; a prompt that occurs twice counts once.

    Answers are what is said once reasoning is taken away; which of them are none is noted.

    Labels are what stands after `generations_` in the files' names. With `--against chosen` side 1 is the answer that
    people chose in the held-out `pairs`.

    Raises:
        UserError: a file is missing or damaged, or the sides answer different prompts.
    """
    file_1, file_2 = options.generation_files
    if options.run_dir is not None and options.against == CHOSEN:
        return _against_chosen(file_2, options.policy, chosen_answers(pairs))
    return paired(file_1, file_2, *map(label_of, (file_1, file_2)))


def label_of(file: Path) -> str:
    """What stands after `generations_` in a file's name."""
    return file.name.split(".")[0].removeprefix("generations_")


def paired(file_1: Path, file_2: Path, label_1: str, label_2: str) -> list[Comparison]:
    """The answers of two generation files, joined by prompt.

    Raises:
        UserError: a file is missing or damaged, or they answer different prompts.
    """
    rows_1, rows_2 = _generations(file_1), _generations(file_2)
    if differing := rows_1.keys() ^ rows_2.keys():
        raise UserError(f"{file_1} and {file_2}: {len(differing)} prompts are in one only; generate both on the same")
    return [
        Comparison(
            key,
            row["messages"],
            spoken(row["text"]),
            spoken(rows_2[key]["text"]),
            label_1,
            label_2,
            non_answer(row),
            non_answer(rows_2[key]),
        )
        for key, row in rows_1.items()
    ]


def _against_chosen(file: Path, label: str, chosen: Mapping[str, str]) -> list[Comparison]:
    rows = _generations(file)
    if missing := rows.keys() - chosen.keys():
        raise UserError(f"{file}: {len(missing)} prompts are none of the held-out pairs; name those they are from")
    return [
        Comparison(key, row["messages"], chosen[key], spoken(row["text"]), CHOSEN, label, None, non_answer(row))
        for key, row in rows.items()
    ]


def _generations(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; generate answers first")
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_log(file), start=1):
        for field, kind in (("prompt_id", str), ("messages", list), ("text", str)):
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise UserError(f"{file} line {number}: {field} is missing or not a {kind.__name__}")
        rows.setdefault(row["prompt_id"], row)
    return rows
