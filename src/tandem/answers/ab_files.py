"""A/B files for outside judges, people or programs: the answers without names, and the names in a file apart.

`ab_questions.jsonl` goes to the judge: `prompt_id`, `messages`, `answer_a`, `answer_b`. `ab_key.json` stays here and
says which model answer A is from. The judge sends back a file with a line for each prompt: `prompt_id` and `verdict`,
which is A, B or tie.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.runs import read_jsonl, write_atomic, write_json

QUESTIONS, KEY = "ab_questions.jsonl", "ab_key.json"
MODEL, TIE = "model", "tie"  # winners; the third is the name of the side that the model is compared with

Row = Mapping[str, Any]  # prompt_id, messages, and `answers` by label


def policy_is_a(prompt_id: str, seed: int) -> bool:
    """Whether the policy's answer to a prompt is shown as A, at random for each prompt."""
    return random.Random(f"{seed} {prompt_id}").random() < 0.5


def write_questions(folder: Path, rows: Sequence[Row], policy: str, against: str, seed: int) -> None:
    """Write the questions and their key."""
    questions, a_is = [], {}
    for row in rows:
        key = row["prompt_id"]
        a, b = (policy, against) if policy_is_a(key, seed) else (against, policy)
        a_is[key] = a
        questions.append(
            {
                "prompt_id": key,
                "messages": row["messages"],
                "answer_a": row["answers"][a],
                "answer_b": row["answers"][b],
            }
        )
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    write_atomic(folder / QUESTIONS, "".join(lines))
    write_json(folder / KEY, {"policy": policy, "against": against, "seed": seed, "a_is": a_is})


def read_winners(file: Path, folder: Path, rows: Sequence[Row], policy: str, against: str) -> dict[str, str]:
    """The winners by prompt id, from an outside judge's file: `model` (the policy), `against` or `tie`.

    Raises:
        UserError: there are no questions in `folder`, they are about other answers than those of `rows`, or a line of
            the file is not a verdict on one of them.
    """
    a_is = _key_of_these_answers(folder, rows, policy, against)
    winners: dict[str, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        key, verdict = line.get("prompt_id"), line.get("verdict")
        if not isinstance(key, str) or key not in a_is:
            raise UserError(f"{file} line {number}: prompt_id {key!r} is none of {folder / QUESTIONS}")
        if key in winners:
            raise UserError(f"{file} line {number}: prompt_id {key} has a verdict already")
        if verdict not in ("A", "B", TIE):
            raise UserError(f"{file} line {number}: verdict must be A, B or tie, not {verdict!r}")
        winners[key] = winner(verdict, a_is[key] == policy, against)
    return winners


def winner(verdict: str, model_is_a: bool, against: str) -> str:
    """The winner that a verdict on A and B means: `model`, `against` or `tie`."""
    if verdict == TIE:
        return TIE
    return MODEL if (verdict == "A") == model_is_a else against


def _key_of_these_answers(folder: Path, rows: Sequence[Row], policy: str, against: str) -> dict[str, str]:
    try:
        key = json.loads((folder / KEY).read_text(encoding="utf-8"))
        questions = {question["prompt_id"]: question for question in read_jsonl(folder / QUESTIONS)}
        sides, a_is = {key["policy"], key["against"]}, dict(key["a_is"])
    except FileNotFoundError:
        raise UserError(f"{folder / KEY}: not there; write the questions with --shuffle_ab first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: {KEY} or {QUESTIONS} is damaged ({error!r}); restore it") from error
    if sides != {policy, against}:
        raise UserError(f"{folder / KEY}: is about {' and '.join(sorted(sides))}, not {policy} and {against}")
    for row in rows:
        question, a = questions.get(row["prompt_id"]), a_is.get(row["prompt_id"])
        if question is None or a is None:
            continue  # a prompt that was not asked about has no verdict
        b = against if a == policy else policy
        if (question["answer_a"], question["answer_b"]) != (row["answers"][a], row["answers"][b]):
            raise UserError(f"{folder / QUESTIONS}: prompt {row['prompt_id']} has other answers now; judge it anew")
    return a_is


def _lines(file: Path) -> list[dict[str, Any]]:
    # Not `read_jsonl`, which drops a last line without a newline: other programs may leave the newline out
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--ab_verdicts {file}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict):
            raise UserError(f"{file} line {number}: must be an object with prompt_id and verdict")
    return lines
