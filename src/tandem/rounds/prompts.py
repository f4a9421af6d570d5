"""Prompts of any data set that Tandem reads, with or without answers, kept apart from the held-out ones."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.formats import Message, RowError, as_messages, detect_format, kind_of, prompt_id, to_canonical
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out, load_training, may_hold_out, read_split, split_by_prompt
from tandem.errors import UserError, one_line

# What stands in for the answers that a row of prompts lacks, so that the formats' own readers can be used
_TEXTS = {"chosen": "-", "rejected": "."}
_MESSAGES = {side: [{"role": "assistant", "content": text}] for side, text in _TEXTS.items()}
_CONVERSATIONS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Prompt:
    """A prompt, the row that it is from, and the answer that the data prefers, where there is one."""

    messages: list[Message]
    row: Mapping[str, Any]
    chosen: str | None = None

    @property
    def prompt_id(self) -> str:
        return prompt_id(self.messages)


def training_prompts(options: DataOptions) -> list[Prompt]:
    """The distinct prompts of the training part, without those that are held out as well.

    Raises:
        UserError: the data cannot be read, or all of its prompts are held out.
    """
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
    # The reader of pairs draws the same prompts, whose ids are of the prompt as it is there: text, or messages
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
    return Prompt(as_messages(pair["prompt"]), row, text.strip())


def _read(options: DataOptions, split: str) -> list[Prompt]:
    return [prompt for _, prompt in _keyed(options, split)]


def _keyed(options: DataOptions, split: str) -> list[tuple[str | list[Message], Prompt]]:
    """Each prompt as the reader of pairs has it, and as messages."""
    found: list[tuple[str | list[Message], Prompt]] = []
    bad: list[str] = []
    for source, number, row in read_split(options, split):
        try:
            if isinstance(row, RowError):
                raise row
            if missing := [key for key in options.keys.values() if key not in row]:
                raise RowError(f"no column {missing[0]!r}, named by a --…_key option")
            found.append(_prompt(row, options))
        except RowError as error:
            bad.append(f"{source} row {number}: {error}")
            if len(bad) > options.max_bad_rows:
                raise UserError(bad[-1]) from None
    for line in bad:
        print(f"skipped {one_line(line)}", file=sys.stderr)
    if not found:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows to take prompts from")
    return found


def _prompt(row: Mapping[str, Any], options: DataOptions) -> tuple[str | list[Message], Prompt]:
    named = {**row, **{name: row[key] for name, key in options.keys.items()}}
    pair_format = options.data_format or detect_format(named)
    if pair_format is not None and "chosen" in named and "rejected" in named:
        pair = to_canonical(named, pair_format)
        return pair["prompt"], _of_pair(pair, row)
    conversation = next((named[name] for name in _CONVERSATIONS if isinstance(named.get(name), list)), None)
    if conversation is not None and "prompt" not in named:
        return _of_conversation(conversation, row)
    stand_ins = _MESSAGES if isinstance(named.get("prompt"), list) else _TEXTS
    row_of_pair = {**named, **stand_ins}
    own_format = options.data_format or detect_format(row_of_pair)
    if own_format is None:
        raise RowError("has no prompt: there is no column prompt, messages, question or instruction; see --prompt_key")
    prompt = to_canonical(row_of_pair, own_format)["prompt"]
    answer = named.get("chosen", named.get("completion", named.get("response")))
    chosen = answer.strip() if isinstance(answer, str) and answer.strip() else None
    return prompt, Prompt(as_messages(prompt), row, chosen)


def _of_conversation(turns: list[Any], row: Mapping[str, Any]) -> tuple[list[Message], Prompt]:
    """The conversation up to its last user's turn; an answer that follows is the data's own."""
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number}: must be an object, not {kind_of(turn)}")
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise RowError(f"message {number}: has no 'role' and 'content' of text")
        messages.append({"role": _ROLES.get(role, role), "content": text})
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise RowError("the conversation has no user's turn")
    prompt = messages[: last + 1]
    checked = to_canonical({"prompt": prompt, **_MESSAGES}, "messages")["prompt"]
    after = messages[last + 1 : last + 2]
    chosen = after[0]["content"].strip() if after and after[0]["role"] == "assistant" else None
    return checked, Prompt(checked, row, chosen or None)
