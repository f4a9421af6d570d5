"""Canonical rows → what a tokenizer reads: templates, transcripts, and prompts cut to length."""

import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from tandem.data.formats import Message, Row, to_transcript
from tandem.data.messages import PARTS, extras_of
from tandem.data.rendering import TemplateFault, keywords_of, templated
from tandem.data.tokenized import check_asked, plain_ids, text_ids
from tandem.data.tokenized import tokenize_pair as tokenize_pair
from tandem.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "plain"
_ASKS = "\n\nAssistant:"


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
    """`row` with all texts as messages (`use_chat_template`) or all as plain text.

    An answer of several turns that becomes text has `chosen_turns` or `rejected_turns` beside it: where in it the
    assistant's own turns stand, as [start, end] pairs.

    Raises:
        TemplateFault: parts of messages that only a chat template renders.
    """
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if use_chat_template and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text.strip()}] for text in (chosen, rejected))
    elif not use_chat_template and not isinstance(prompt, str):
        _refuse_parts(row)
        turns = {f"{side}_turns": _own_turns(row[side]) for side in ("chosen", "rejected") if len(row[side]) > 1}
        prompt = to_transcript(prompt) + _ASKS
        chosen, rejected = (to_transcript(turns).removeprefix(_ASKS) for turns in (chosen, rejected))
        row = row | turns
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _refuse_parts(row: Row) -> None:
    messages = [turn for part in ("prompt", "chosen", "rejected") for turn in row[part]]
    parts = [name for turn in messages for name in turn if name in PARTS]
    parts += ["a tool's result"] * any(turn["role"] == "tool" for turn in messages)
    parts += [name for name in ("tools", "chat_template_kwargs") if row.get(name)]
    if parts:
        raise TemplateFault(f"{parts[0]} cannot be written as a transcript", "leave out --use_chat_template false")


def _own_turns(answer: list[Message]) -> list[list[int]]:
    """Where the assistant's turns stand in an answer as a transcript, from the space before them on."""
    turns, end = [], -len(_ASKS)
    for turn in answer:
        start, end = end, end + len(to_transcript([turn]))
        if turn["role"] == "assistant":
            turns.append([start + len(_ASKS), end])
    return turns


def trim_prompt(
    prompt: str | list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    keywords: Mapping[str, Any] | None = None,
) -> str | list[Message]:
    """The prompt's end, in at most `max_tokens` tokens as rendered for an answer.

    A conversation, or a transcript of one, loses its oldest turns, its system message last of all; a single turn or
    another text loses its beginning.

    Args:
        keywords: what the row has for the chat template, `rendering.keywords_of`.

    Raises:
        UserError: the template alone takes more than `max_tokens`, or refuses the prompt.
    """
    if isinstance(prompt, str):
        return _trim_text(prompt, tokenizer, max_tokens)

    def length(messages: list[Message]) -> int:
        return len(prompt_ids(messages, tokenizer, keywords))

    system = [message for message in prompt[:1] if message["role"] == "system"]
    turns = prompt[len(system) :]
    while length(system + turns) > max_tokens and len(turns) > 1:
        # A prompt begins with a user's turn, so an answer and what tools gave it go with the question
        later = (index for index, turn in enumerate(turns) if index and turn["role"] == "user")
        turns = turns[next(later, len(turns) - 1) :]
    if length(system + turns) <= max_tokens:
        return system + turns
    if system:
        return trim_prompt(turns, tokenizer, max_tokens, keywords)
    return [_trim_turn(turns[0], tokenizer, max_tokens, length)]


def _trim_turn(
    turn: Message, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, length: Callable[[list[Message]], int]
) -> Message:
    whole = turn["content"]
    keep = len(plain_ids(whole, tokenizer))
    while (excess := length([turn]) - max_tokens) > 0:
        keep -= excess
        if keep < 1:
            template = length([{**turn, "content": ""}])
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


def prompt_ids(
    prompt: str | list[Message], tokenizer: "PreTrainedTokenizerBase", keywords: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt as the model sees it before it answers; `keywords` are the template's.

    Raises:
        TemplateFault: the chat template refuses it.
    """
    if isinstance(prompt, str):
        return text_ids(prompt, tokenizer)
    return plain_ids(templated(prompt, tokenizer, keywords, asks=True), tokenizer)


def asked_ids(messages: list[Message], tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[int]:
    """Token ids of a prompt for which an answer is drawn, cut to `max_tokens` (`trim_prompt`).

    Raises:
        TemplateFault: the chat template refuses it, or leaves out a part of it.
        UserError: the template alone takes more than `max_tokens`.
    """
    keywords = keywords_of(extras_of(messages))
    trimmed: Any = trim_prompt(list(messages), tokenizer, max_tokens, keywords)
    text = templated(trimmed, tokenizer, keywords, asks=True)
    check_asked({"prompt": trimmed, "tools": keywords["tools"]}, text, tokenizer)
    return plain_ids(text, tokenizer)


def _last_tokens(text: str, tokenizer: "PreTrainedTokenizerBase", count: int) -> str:
    """The end of `text` that takes at most `count` tokens when it is tokenized anew."""
    ids = plain_ids(text, tokenizer)
    if len(ids) <= count:
        return text
    for keep in range(count, 0, -1):
        end = str(tokenizer.decode(ids[-keep:])).lstrip("\ufffd")  # what is left of a character cut in two
        if len(plain_ids(end, tokenizer)) <= count:
            return end
    return ""
