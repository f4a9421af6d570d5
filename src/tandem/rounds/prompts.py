"""Reads the prompts of any data set that Tandem reads, with or without answers; held-out ones apart from the others."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.balance import Balance
from tandem.data.formats import Message, Row, RowError, asked_of, detect_format, prompt_id, to_canonical
from tandem.data.messages import read_turns
from tandem.data.options import DataOptions
from tandem.data.rows import TrackedRow, has_value
from tandem.data.shapes import known_shape
from tandem.data.sources import (
    arranged,
    load_held_out,
    load_training,
    may_hold_out,
    of_own_split,
    read_split,
    split_by_prompt,
)
from tandem.errors import UserError, one_line

# Placeholders for answers that a row lacks, so that the formats' own readers can read it
_TEXTS = {"chosen": "-", "rejected": "."}
_MESSAGES = {side: [{"role": "assistant", "content": text}] for side, text in _TEXTS.items()}
_CONVERSATIONS = ("messages", "conversations")
_ANSWERS = ("chosen", "completion", "response")  # columns that may hold the preferred answer


@dataclass(frozen=True)
class Prompt:
    """A prompt, the row that it is from, and the preferred answer, if the data has one."""

    messages: list[Message]
    row: Mapping[str, Any]
    chosen: str | None = None

    @property
    def prompt_id(self) -> str:
        return prompt_id(self.messages)


def training_prompts(options: DataOptions) -> list[Prompt]:
    """The distinct prompts of the training part, without those that are held out too.

    Raises:
        UserError: the data cannot be read, or all of its prompts are held out.
    """
    options = options if options.is_mixture else of_own_split(options)
    if options.is_mixture:
        train, held_out = _pairs(load_training(options)), _pairs(load_held_out(options))
    elif options.val_ratio:
        train, held_out = _halves(options)
    else:
        train = _read(options, options.dataset_train_split)
        held_out = _read(options, options.dataset_test_split) if may_hold_out(options) else []
    if not held_out:
        print(f"{options.dataset_name} holds nothing out: prompts are of all of it", file=sys.stderr)
    shut = {prompt.prompt_id for prompt in held_out}
    open_to_all = _distinct([prompt for prompt in train if prompt.prompt_id not in shut])
    if not open_to_all:
        raise UserError(f"--dataset_name {options.dataset_name}: all of its prompts are held out")
    return open_to_all


def held_out_prompts(options: DataOptions) -> list[Prompt]:
    """The distinct prompts of the held-out part.

    Raises:
        UserError: the data cannot be read, or has no held-out part.
    """
    options = options if options.is_mixture else of_own_split(options)
    if options.is_mixture:
        return _distinct(_pairs(load_held_out(options)))
    if options.val_ratio:
        return _distinct(_halves(options)[1])
    if not may_hold_out(options):
        raise UserError(
            f"--dataset_name {options.dataset_name}: has no split {options.dataset_test_split}; hold prompts out with "
            "--val_ratio"
        )
    return _distinct(_read(options, options.dataset_test_split))


def _halves(options: DataOptions) -> tuple[list[Prompt], list[Prompt]]:
    # Keyed by the prompt as the reader of pairs has it, text or messages, so that the same prompts are held out
    rows = [{"prompt": key, "found": found} for key, found in _keyed(options, options.dataset_train_split)]
    halves = split_by_prompt(rows, options.val_ratio, options.data_seed)
    train, held_out = ([row["found"] for row in half] for half in halves)
    return train, held_out


def _distinct(prompts: list[Prompt]) -> list[Prompt]:
    by_id: dict[str, Prompt] = {}
    for prompt in prompts:
        by_id.setdefault(prompt.prompt_id, prompt)
    return list(by_id.values())


def _pairs(pairs: list[dict[str, Any]]) -> list[Prompt]:
    return [_of_pair(pair, pair) for pair in pairs]


def _of_pair(pair: Mapping[str, Any], row: Mapping[str, Any]) -> Prompt:
    chosen = pair["chosen"]
    text = chosen if isinstance(chosen, str) else chosen[0]["content"]
    return Prompt(asked_of(pair), row, text.strip())


def _read(options: DataOptions, split: str) -> list[Prompt]:
    return [prompt for _, prompt in _keyed(options, split)]


def _keyed(options: DataOptions, split: str) -> list[tuple[str | list[Message], Prompt]]:
    """Each prompt as the reader of pairs has it, text or messages, and as a `Prompt`."""
    found: list[tuple[str | list[Message], Prompt]] = []
    bad: list[str] = []
    balance = Balance(f"{options.dataset_name} ({split})")
    for source, number, row in read_split(options, split):
        try:
            if isinstance(row, RowError):
                raise row
            pair, chosen = _read_row(arranged(source, number, row, options, balance), options, balance)
            found.append((pair["prompt"], Prompt(asked_of({**pair, "source": source, "row": number}), row, chosen)))
        except RowError as error:
            bad.append(f"{source} row {number}: {error}")
            if len(bad) > options.max_bad_rows:
                raise UserError(bad[-1]) from None
    for line in bad:
        print(f"skipped {one_line(line)}", file=sys.stderr)
    if not found:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows to take prompts from")
    balance.tell()
    return found


def _read_row(row: Row, options: DataOptions, balance: Balance) -> tuple[Row, str | None]:
    """A canonical row with the prompt of `row`, and the preferred answer, if there is one."""
    pair_format = options.data_format or detect_format(shaped := known_shape(row, options.data_format))
    if pair_format is not None and "chosen" in shaped and "rejected" in shaped:
        pair = to_canonical(shaped, pair_format, balance)
        answer = pair["chosen"]
        return pair, (answer if isinstance(answer, str) else str(answer[0]["content"])).strip()
    name = next((name for name in _CONVERSATIONS if isinstance(row.get(name), list)), None)
    if name is not None and not has_value(row.get("prompt")):
        return _of_conversation(row, name, balance)
    column = next((name for name in _ANSWERS if isinstance(row.get(name), str)), None)
    answer = row[column].strip() if column else None
    asks = {name: value for name, value in row.items() if name != column}
    asks |= _MESSAGES if isinstance(asks.get("prompt"), list) else _TEXTS
    own_format = options.data_format or detect_format(asks)
    if own_format is None:
        raise RowError("has no prompt: there is no column prompt, messages, question or instruction; see --prompt_key")
    return to_canonical(asks, own_format, balance), answer or None


def _of_conversation(row: Row, column: str, balance: Balance) -> tuple[Row, str | None]:
    """The conversation up to its last turn of the user or a tool, and the assistant's answer after it, if any."""
    tracked = TrackedRow(known_shape({"messages": row[column]}, None))
    turns = read_turns(tracked, "messages")
    last = max((at for at, turn in enumerate(turns) if turn["role"] in ("user", "tool")), default=None)
    if last is None:
        raise RowError("the conversation has no user's turn")
    beside = {name: value for name, value in row.items() if name not in (column, "prompt", *_TEXTS)}
    pair = to_canonical({**beside, **tracked.inside, "prompt": turns[: last + 1], **_MESSAGES}, "messages", balance)
    after = turns[last + 1 : last + 2]
    chosen = after[0]["content"].strip() if after and after[0]["role"] == "assistant" else None
    return pair, chosen or None
