"""Any known shape of a preference row → the canonical row.

Canonical: `prompt`, `chosen`, `rejected`, all three text or all three lists of `{"role", "content"}` messages, plus
`pair_id`, `source` and `row`. `chosen` and `rejected` never repeat the prompt.
"""

import re
from collections.abc import Callable
from typing import Any

from tandem.errors import UserError
from tandem.runs import sha256_json

Message = dict[str, str]
Row = dict[str, Any]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, tokenizers and files cannot
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(Exception):
    """What is wrong with one row, beginning with the field at fault; the reader adds file and row number."""


def to_canonical(row: Row, data_format: str) -> Row:
    """The canonical row of `row`, without `source` and `row`.

    Raises:
        RowError: a missing column, a value of the wrong type, an empty completion, roles out of order.
    """
    prompt, chosen, rejected = _CONVERTERS[data_format](row)
    for field, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if _SURROGATE.search(_text_of(value)):
            raise RowError(f"field {field!r}: has half of a surrogate pair, which is no character")
        if field != "prompt" and not _text_of(value).strip():
            raise RowError(f"field {field!r}: the completion is empty")
    if isinstance(prompt, list):
        _check_roles(prompt)
    identity = sha256_json([prompt, chosen, rejected])[:16]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair_id": identity}


def detect_format(row: Row) -> str | None:
    """The format whose columns `row` has, or None; the caller asks every row, not just the first."""
    if not _has_answers(row):
        return None
    chosen = row["chosen"]
    if "conversations" in row:
        return "sharegpt"
    if "question" in row:
        return "orca"
    if "instruction" in row:
        return "alpaca"
    if isinstance(chosen, list):
        return "messages"
    if isinstance(chosen, str) and "prompt" in row:
        return "prompt_pair"
    if isinstance(chosen, str) and _TURN.search(chosen):
        return "hh"
    return None


def _has_answers(row: Row) -> bool:
    return "chosen" in row and "rejected" in row


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as a conversation; a text is one user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_id(prompt: str | list[Message]) -> str:
    """Stable id of a prompt: 16 hex digits of a content hash."""
    return sha256_json(prompt)[:16]


def _text_of(value: str | list[Message]) -> str:
    return value if isinstance(value, str) else "".join(message["content"] for message in value)


def _string(row: Row, field: str, *, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if field not in row:
        raise RowError(f"column {field!r} is missing; columns are {', '.join(map(str, row))}")
    if not isinstance(value, str):
        raise RowError(f"field {field!r}: must be text, not {type(value).__name__}")
    return value


def _check_roles(prompt: list[Message]) -> None:
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] != "user":
        raise RowError("field 'prompt': must end with a user's turn")
    if "system" in turns:
        raise RowError("field 'prompt': a system turn may only come first")


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


def _hh(row: Row) -> tuple[Any, Any, Any]:
    chosen = parse_transcript(_string(row, "chosen"), "chosen")
    rejected = parse_transcript(_string(row, "rejected"), "rejected")
    return _split_shared(chosen, rejected)


def _prompt_pair(row: Row) -> tuple[Any, Any, Any]:
    prompt, chosen, rejected = (_string(row, field) for field in ("prompt", "chosen", "rejected"))
    if not prompt.lstrip().startswith("Human:"):
        return prompt, chosen, rejected
    messages = parse_transcript(prompt, "prompt")
    if messages[-1] == {"role": "assistant", "content": ""}:  # "…\n\nAssistant:" asks for the answer that follows
        messages.pop()
    return messages, _assistant(chosen), _assistant(rejected)


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text.strip()}]


def _one_turn(system: str, question: str, row: Row) -> tuple[Any, Any, Any]:
    messages = [{"role": "system", "content": system}] if system.strip() else []
    messages.append({"role": "user", "content": question})
    return messages, _assistant(_string(row, "chosen")), _assistant(_string(row, "rejected"))


def _alpaca(row: Row) -> tuple[Any, Any, Any]:
    extra = _string(row, "input", default="")
    question = _string(row, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
    return _one_turn(_string(row, "system", default=""), question, row)


def _orca(row: Row) -> tuple[Any, Any, Any]:
    return _one_turn(_string(row, "system", default=""), _string(row, "question"), row)


def _messages(row: Row) -> tuple[Any, Any, Any]:
    chosen, rejected = (_message_list(row, field) for field in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        turns = _message_list(row, "prompt")
        return turns, _without_prompt(turns, chosen), _without_prompt(turns, rejected)
    if len(chosen) > 1 or len(rejected) > 1:  # they repeat the prompt (ultrafeedback_binarized)
        return _split_shared(chosen, rejected)
    return [{"role": "user", "content": _string(row, "prompt")}], chosen, rejected


def _without_prompt(prompt: list[Message], completion: list[Message]) -> list[Message]:
    return completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion


def _message_list(row: Row, field: str) -> list[Message]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise RowError(f"field {field!r}: must be a list of messages, not {type(value).__name__}")
    return [_message(item, field, "role", "content", None) for item in value]


def _message(item: Any, field: str, role_key: str, text_key: str, roles: dict[str, str] | None) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get(text_key), str):
        raise RowError(f"field {field!r}: each message needs {role_key!r} and {text_key!r} as text")
    role = item.get(role_key)
    if roles is not None:
        role = roles.get(str(role))
    if role not in ("system", "user", "assistant"):
        raise RowError(f"field {field!r}: unknown {role_key} {item.get(role_key)!r}")
    return {"role": role, "content": item[text_key]}


def _sharegpt(row: Row) -> tuple[Any, Any, Any]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise RowError("field 'conversations': must be a list of turns")
    prompt = [_message(turn, "conversations", "from", "value", _SHAREGPT_ROLES) for turn in conversation]
    system = _string(row, "system", default="")
    if system.strip() and prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": system})
    chosen, rejected = (
        [_message(row.get(field), field, "from", "value", _SHAREGPT_ROLES)] for field in ("chosen", "rejected")
    )
    return prompt, chosen, rejected


_CONVERTERS: dict[str, Callable[[Row], tuple[Any, Any, Any]]] = {
    "hh": _hh,
    "prompt_pair": _prompt_pair,
    "alpaca": _alpaca,
    "orca": _orca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
FORMATS = tuple(_CONVERTERS)


def choose_format(rows: list[tuple[str, Row]]) -> str:
    """The one format that every row of `rows` ((place, row) each) has.

    Raises:
        UserError: a row that no format fits, or two rows of different formats; both named by their place.
    """
    found: dict[str, str] = {}
    for place, row in rows:
        name = detect_format(row)
        if name is not None:
            found.setdefault(name, place)
        elif not _has_answers(row):
            raise _no_format(place, row)
        # else its values tell no format: converting it will say what is wrong with them
    if not found:
        raise _no_format(*rows[0])
    if len(found) > 1:
        (first, here), (second, there) = list(found.items())[:2]
        raise UserError(f"{there}: looks like {second}, but {here} looks like {first}; force one with --data_format")
    return next(iter(found))


def _no_format(place: str, row: Row) -> UserError:
    columns = ", ".join(map(str, row)) or "none"
    return UserError(
        f"{place}: no known preference format has the columns {columns}; name it with --data_format "
        f"({', '.join(FORMATS)}) and its columns with --prompt_key, --chosen_key, --rejected_key"
    )
