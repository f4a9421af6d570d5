"""Turns a preference row of any known format into the canonical row.

Canonical: `prompt`, `chosen`, `rejected`, all three text or all three lists of messages (`data.messages`), plus
`pair_id`, `source` and `row`, and where the row has them `tools` (a list) and `chat_template_kwargs` (a dict). `chosen`
and `rejected` never repeat the prompt.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tandem.data import columns
from tandem.data.balance import Balance
from tandem.data.messages import EXTRAS, all_text, extras_of, read_turns
from tandem.data.messages import Asked as Asked
from tandem.data.messages import Message as Message
from tandem.data.rows import Row as Row
from tandem.data.rows import RowError as RowError
from tandem.data.rows import TrackedRow, columns_of, has_value, leaves
from tandem.data.rows import kind_of as kind_of
from tandem.errors import UserError
from tandem.runs import sha256_json

Parts = tuple[Any, Any, Any]  # prompt, chosen, rejected

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, tokenizers and files cannot
_LONGEST_TEXT = 10_000_000  # characters, some ten books: a longer text is a file that was read wrongly
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_BY_COLUMN = {"question": "orca", "instruction": "alpaca", "prompt": "prompt_pair"}  # where answers are text
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def to_canonical(row: Row, data_format: str, balance: Balance | None = None) -> Row:
    """The canonical row of `row`, without `source` and `row`; what of it is not read is added to `balance`.

    Raises:
        RowError: a missing column, a value of the wrong type, an empty completion, roles out of order, content that
            would be lost.
    """
    tracked = TrackedRow(row)
    columns.refuse_media(tracked)
    prompt, chosen, rejected = _CONVERTERS[data_format](tracked)
    prompt, chosen, rejected, extras = columns.add_context(tracked, prompt, chosen, rejected)
    for field, value, name in (
        ("prompt", prompt, "prompt"), ("chosen", chosen, "completion"), ("rejected", rejected, "completion")
    ):  # fmt: skip
        _check_text(field, value, name)
    _check_text("tools", "\n".join(leaves(extras)), "tools", may_be_empty=True)
    if isinstance(prompt, list):
        _check_prompt_roles(prompt)
        _check_completion_roles("chosen", chosen)
        _check_completion_roles("rejected", rejected)
    unread = columns.refuse_lost(tracked, prompt)
    if balance is not None:
        balance.add(tracked, unread)
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extras}
    return pair | {"pair_id": pair_id_of(pair)}


def pair_id_of(pair: Row) -> str:
    """Stable id of a canonical row: 16 hex digits of a hash of all that its tokens are made of."""
    extras = {name: pair[name] for name in EXTRAS if pair.get(name)}
    parts = [pair[part] for part in ("prompt", "chosen", "rejected")]
    return sha256_json([*parts, *([extras] if extras else [])])[:16]


def detect_format(row: Row) -> str | None:
    """The format whose columns `row` has, or None; the caller asks every row, not just the first."""
    if "chosen" not in row or "rejected" not in row:
        return None
    if "conversations" in row:
        return "sharegpt"
    answers = [row["chosen"], row["rejected"]]
    if any(isinstance(answer, list) for answer in answers):
        return "messages"
    texts = [answer for answer in answers if isinstance(answer, str)]
    if not texts:
        return None
    for column, name in _BY_COLUMN.items():
        if column in row:
            return name
    return "hh" if any(_TURN.search(text) for text in texts) else None


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as a conversation; a text is one user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def asked_of(pair: Mapping[str, Any]) -> Asked:
    """The prompt of a canonical row, with all that its chat template gets besides messages."""
    place = f"{pair['source']} row {pair['row']}" if "source" in pair else ""
    return Asked(as_messages(pair["prompt"]), pair, place)


def prompt_id(prompt: str | list[Message]) -> str:
    """Stable id of a prompt: 16 hex digits of a hash of its messages, be they given as text or as a list.

    The same question with other tools is another prompt, if `prompt` has its tools with it (`messages.Asked`).
    """
    messages = as_messages(prompt)
    extras = extras_of(messages)
    return sha256_json([messages, extras] if extras else messages)[:16]


def _string(row: Row, field: str, *, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if field not in row:
        raise RowError(f"column {field!r} is missing; columns are {columns_of(row)}")
    if not isinstance(value, str):
        raise RowError(f"field {field!r}: must be text, not {kind_of(value)}")
    return value


def _check_text(field: str, value: str | list[Message], name: str, *, may_be_empty: bool = False) -> None:
    text = all_text(value)
    if _SURROGATE.search(text):
        raise RowError(f"field {field!r}: has half of a surrogate pair, which is no character")
    if "\0" in text:
        raise RowError(f"field {field!r}: has a NUL character, which no text has")
    if len(text) > _LONGEST_TEXT:
        raise RowError(
            f"field {field!r}: has {len(text):,} characters; more than {_LONGEST_TEXT:,} are taken for a mistake"
        )
    if not may_be_empty and not text.strip():
        raise RowError(f"field {field!r}: the {name} is empty")


def _check_prompt_roles(prompt: list[Message]) -> None:
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] not in ("user", "tool"):
        raise RowError("field 'prompt': must end with a user's turn")
    if "system" in turns:
        raise RowError("field 'prompt': a system turn may only come first")


def _check_completion_roles(field: str, completion: list[Message]) -> None:
    for message, place in ((completion[0], "begin"), (completion[-1], "end")):
        if message["role"] != "assistant":
            raise RowError(
                f"field {field!r}: the completion must {place} with an assistant's turn, not {message['role']}'s"
            )


def parse_transcript(text: str, field: str) -> list[Message]:
    """The turns of an HH transcript (`\\n\\nHuman: …\\n\\nAssistant: …`) as messages.

    Raises:
        RowError: no turn markers, or text before the first.
    """
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise RowError(f"field {field!r}: not a transcript: must begin with 'Human:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _HH_ROLES[mark.group(1)], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def to_transcript(messages: list[Message]) -> str:
    """Messages as an HH transcript; a system turn becomes the text before the first marker."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(names[message["role"]] + message["content"] for message in messages)


def _split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations before the last assistant turn whose whole context they share."""
    split = None
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left["role"] == right["role"] == "assistant" and index > 0:
            split = index
        if left != right:
            break
    if split is None:
        raise RowError("fields 'chosen' and 'rejected': share no prompt that an assistant's turn follows")
    return chosen[:split], chosen[split:], rejected[split:]


def _hh(row: TrackedRow) -> Parts:
    chosen = parse_transcript(_string(row, "chosen"), "chosen")
    rejected = parse_transcript(_string(row, "rejected"), "rejected")
    return _split_shared(chosen, rejected)


def _prompt_pair(row: TrackedRow) -> Parts:
    prompt, chosen, rejected = (_string(row, field) for field in ("prompt", "chosen", "rejected"))
    if all(text.lstrip().startswith("Human:") for text in (chosen, rejected)):
        return _repeated(_prompt_turns(prompt), *_hh(row))
    prompt = _with_input(row, prompt)
    if not prompt.lstrip().startswith("Human:"):
        return prompt, chosen, rejected
    return _prompt_turns(prompt), _assistant(chosen), _assistant(rejected)


def _prompt_turns(prompt: str) -> list[Message]:
    if not prompt.lstrip().startswith("Human:"):
        return [{"role": "user", "content": prompt}]
    messages = parse_transcript(prompt, "prompt")
    if messages[-1] == {"role": "assistant", "content": ""}:  # "…\n\nAssistant:" asks for the answer that follows
        messages.pop()
    return messages


def _repeated(asked: list[Message], prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Parts:
    """Prompt and answers of a row whose 'chosen' and 'rejected' repeat the prompt that 'prompt' holds.

    Raises:
        RowError: they begin with another prompt.
    """
    contents = {turn["content"].strip() for turn in prompt}
    if not all(turn["content"].strip() in contents for turn in asked):
        raise RowError(
            "field 'prompt': is not in the conversation that 'chosen' and 'rejected' begin with, so two could be the "
            "prompt: leave one out, as with --ignore_columns prompt"
        )
    return prompt, chosen, rejected


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text.strip()}]


def _with_input(row: TrackedRow, question: str) -> str:
    """A question with the text it is about, which the alpaca format has as `input`."""
    extra = _string(row, "input", default="")
    return question + (f"\n\n{extra}" if extra.strip() and extra.strip() != question.strip() else "")


def _one_turn(question: str, row: TrackedRow) -> Parts:
    messages = [{"role": "user", "content": _with_input(row, question)}]
    return messages, _assistant(_string(row, "chosen")), _assistant(_string(row, "rejected"))


def _alpaca(row: TrackedRow) -> Parts:
    return _one_turn(_string(row, "instruction"), row)


def _orca(row: TrackedRow) -> Parts:
    return _one_turn(_string(row, "question"), row)


def _messages(row: TrackedRow) -> Parts:
    chosen, rejected = (read_turns(row, field) for field in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        turns = read_turns(row, "prompt")
        return turns, _without_prompt(turns, chosen), _without_prompt(turns, rejected)
    if any(turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        # They repeat the prompt, as ultrafeedback_binarized's do
        parts = _split_shared(chosen, rejected)
        return _repeated([{"role": "user", "content": _string(row, "prompt")}], *parts) if has_value(prompt) else parts
    if not has_value(prompt) and len(chosen) > 1 < len(rejected):  # a conversation that the assistant begins
        return _split_shared(chosen, rejected)
    return [{"role": "user", "content": _with_input(row, _string(row, "prompt"))}], chosen, rejected


def _without_prompt(prompt: list[Message], completion: list[Message]) -> list[Message]:
    return completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion


def _sharegpt(row: TrackedRow) -> Parts:
    prompt, chosen, rejected = (
        read_turns(row, field, "from", "value", _SHAREGPT_ROLES) for field in ("conversations", "chosen", "rejected")
    )
    return prompt, chosen, rejected


def _text(row: TrackedRow) -> Parts:
    """A text without a prompt, which SFT trains on whole."""
    return _string(row, "prompt"), _string(row, "chosen"), _string(row, "rejected")


TEXT = "text"
_CONVERTERS: dict[str, Callable[[TrackedRow], Parts]] = {
    "hh": _hh,
    "prompt_pair": _prompt_pair,
    "alpaca": _alpaca,
    "orca": _orca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    TEXT: _text,
}
FORMATS = tuple(name for name in _CONVERTERS if name != TEXT)  # of pairs


def choose_format(rows: Iterable[tuple[str, Row]]) -> tuple[str, str]:
    """The format that most of `rows` ((place, row) each) have, and the place of the first that has it.

    Raises:
        UserError: no row has the columns of a known format.
    """
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    unknown = None
    for place, row in rows:
        if name := detect_format(row):
            found[name] += 1
            first.setdefault(name, place)
        elif unknown is None:
            unknown = place, row
    if found:
        name = found.most_common(1)[0][0]
        return name, first[name]
    assert unknown is not None, "no rows"
    place, row = unknown
    if "chosen" in row and "rejected" in row:
        # Its columns are right, or nearly so: converting it says what is wrong
        name = next((name for column, name in _BY_COLUMN.items() if column in row), None)
        if name:
            return name, place
        if isinstance(row["chosen"], str):
            raise UserError(
                f"{place}: has no prompt: 'chosen' and 'rejected' are no transcripts ('Human: …'), and there is no "
                f"other text column known; name it with --prompt_key (columns are {columns_of(row)})"
            )
    raise UserError(
        f"{place}: no known preference format has the columns {columns_of(row)}; name it with --data_format "
        f"({', '.join(FORMATS)}) and its columns with --prompt_key, --chosen_key, --rejected_key"
    )


def check_format(row: Row, chosen: str, example: str) -> None:
    """Refuse a row that has the columns of another format than `chosen`, which the row at `example` has.

    Raises:
        RowError: naming both formats.
    """
    found = detect_format(row)
    if found not in (None, chosen):
        raise RowError(
            f"looks like {found}, but {example} looks like {chosen}: a source has one format; "
            "put each into a file of its own and mix them (--help, --dataset_name)"
        )
