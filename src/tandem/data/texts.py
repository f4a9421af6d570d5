"""Canonical rows → what a tokenizer reads: templates, transcripts, and prompts cut to length."""

import re
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from tandem.data.formats import Message, Row, to_transcript
from tandem.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "plain"


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Give a tokenizer without a chat template the `plain` one; whether it was needed.

    `plain` renders turns as HH transcripts (`\\n\\nHuman: …\\n\\nAssistant: …`), each answer closed by the
    end-of-sequence token. It needs no new tokens, so a base model can start from it.
    """
    if tokenizer.chat_template is not None:
        return False
    template = resources.files("tandem.data") / "templates" / f"{PLAIN_TEMPLATE}.jinja"
    tokenizer.chat_template = template.read_text()
    return True


def render(row: Row, use_chat_template: bool) -> Row:
    """`row` with all texts as messages (`use_chat_template`) or all as plain text."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if use_chat_template and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in (chosen, rejected))
    elif not use_chat_template and not isinstance(prompt, str):
        prompt = to_transcript(prompt) + "\n\nAssistant:"
        chosen, rejected = (to_transcript(turns).removeprefix("\n\nAssistant:") for turns in (chosen, rejected))
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def trim_prompt(
    prompt: str | list[Message], tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> str | list[Message]:
    """The prompt's end, in at most `max_tokens` tokens as rendered for an answer.

    A conversation, or a transcript of one, loses its oldest turns, its system message last of all; a single turn or
    another text loses its beginning.

    Raises:
        UserError: the template alone takes more than `max_tokens`.
    """
    if isinstance(prompt, str):
        return _trim_text(prompt, tokenizer, max_tokens)
    system = [message for message in prompt[:1] if message["role"] == "system"]
    turns = prompt[len(system) :]
    while _length(system + turns, tokenizer) > max_tokens and len(turns) > 1:
        # A prompt begins with a user's turn, so an answer goes with the question it answers
        turns = turns[2:] if len(turns) > 2 and turns[1]["role"] == "assistant" else turns[1:]
    if _length(system + turns, tokenizer) <= max_tokens:
        return system + turns
    if system:
        return trim_prompt(turns, tokenizer, max_tokens)
    return [_trim_turn(turns[0], tokenizer, max_tokens)]


def _trim_turn(turn: Message, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Message:
    whole = turn["content"]
    keep = len(_plain_ids(whole, tokenizer))
    while (excess := _length([turn], tokenizer) - max_tokens) > 0:
        keep -= excess
        if keep < 1:
            template = _length([{**turn, "content": ""}], tokenizer)
            raise UserError(f"--max_prompt_length {max_tokens}: the chat template alone takes {template} tokens")
        turn = {**turn, "content": _last_tokens(whole, tokenizer, keep)}
    return turn


def _trim_text(text: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
    starts = [0, *(turn.start() for turn in re.finditer("\n\nHuman:", text))]
    for start in starts:
        if len(prompt_ids(text[start:], tokenizer)) <= max_tokens:
            return text[start:]
    special = len(prompt_ids("", tokenizer))
    return _last_tokens(text[starts[-1] :], tokenizer, max_tokens - special)


def _length(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(prompt_ids(messages, tokenizer))


def prompt_ids(prompt: str | list[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a prompt as the model sees it before it answers."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _last_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", count: int) -> str:
    """The end of `text` that takes at most `count` tokens when it is tokenized anew."""
    ids = _plain_ids(text, tokenizer)
    if len(ids) <= count:
        return text
    for keep in range(count, 0, -1):
        end = str(tokenizer.decode(ids[-keep:])).lstrip("\ufffd")  # what is left of a character cut in two
        if len(_plain_ids(end, tokenizer)) <= count:
            return end
    return ""


def _plain_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenize_pair(row: Row, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a rendered row, as TRL 1.16's DPOTrainer makes them.

    The completions begin where the tokens of prompt and prompt + completion part, which a tokenizer that merges
    across the boundary moves into the prompt. Plain text gets the end-of-sequence token, a template brings its own.
    """
    prompt = prompt_ids(row["prompt"], tokenizer)
    whole = [_whole_ids(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected")]
    shared = min(common_length(prompt, ids) for ids in whole)
    return {"prompt_ids": prompt[:shared], "chosen_ids": whole[0][shared:], "rejected_ids": whole[1][shared:]}


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How long a beginning two sequences share."""
    differ = (index for index, (one, other) in enumerate(zip(left, right, strict=False)) if one != other)
    return next(differ, min(len(left), len(right)))


def _whole_ids(prompt: Any, completion: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if not isinstance(prompt, str):
        encoded: Any = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])
    return list(tokenizer(prompt + closed(completion, tokenizer))["input_ids"])


def closed(completion: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A completion of plain text with the end-of-sequence token, if the tokenizer has one."""
    end = tokenizer.eos_token or ""
    return completion if completion.endswith(end) else completion + end
