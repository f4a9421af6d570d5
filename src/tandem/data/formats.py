"""Any known shape of a preference row → the canonical row.

Canonical: `prompt`, `chosen`, `rejected`, all three text or all three lists of `{"role", "content"}` messages, plus
`pair_id`, `source` and `row`. `chosen` and `rejected` never repeat the prompt.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tandem.errors import UserError
from tandem.runs import sha256_json

Message = dict[str, str]
Row = dict[str, Any]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold one, tokenizers and files cannot
_LONGEST_TEXT = 10_000_000  # characters, a shelf of books: beyond it a file was read wrongly, not a pair
_NAMES_SHOWN, _NAME_LENGTH = 12, 40  # of columns in a message; a hostile file can have any number of any length
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_BY_COLUMN = {"question": "orca", "instruction": "alpaca", "prompt": "prompt_pair"}  # where answers are text
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RowError(Exception):
    """What is wrong with one row, beginning with the field at fault; the reader adds file and row number."""


def kind_of(value: Any) -> str:
    """What `value` is, in the words of JSON, for messages."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def columns_of(row: Row) -> str:
    """The names of `row`'s columns, for messages."""
    names = [str(name)[:_NAME_LENGTH] for name in list(row)[:_NAMES_SHOWN]]
    return ", ".join([*names, f"and {len(row) - len(names)} more"] if len(row) > len(names) else names) or "none"


def to_canonical(row: Row, data_format: str) -> Row:
    """The canonical row of `row`, without `source` and `row`.

    Raises:
        RowError: a missing column, a value of the wrong type, an empty completion, roles out of order.
    """
    for field in ("image", "images"):
        if row.get(field):
            raise RowError(f"field {field!r}: is not empty, and Tandem trains on text only")
    prompt, chosen, rejected = _CONVERTERS[data_format](row)
    _check_text("prompt", prompt, "prompt")
    _check_text("chosen", chosen, "completion")
    _check_text("rejected", rejected, "completion")
    if isinstance(prompt, list):
        _check_prompt_roles(prompt)
        _check_completion_roles("chosen", chosen)
        _check_completion_roles("rejected", rejected)
    identity = sha256_json([prompt, chosen, rejected])[:16]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "pair_id": identity}


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
        raise RowError(f"column {field!r} is missing; columns are {columns_of(row)}")
    if not isinstance(value, str):
        raise RowError(f"field {field!r}: must be text, not {kind_of(value)}")
    return value


def _check_text(field: str, value: str | list[Message], name: str) -> None:
    text = _text_of(value)
    if _SURROGATE.search(text):
        raise RowError(f"field {field!r}: has half of a surrogate pair, which is no character")
    if "\0" in text:
        raise RowError(f"field {field!r}: has a NUL character, which no text has")
    if len(text) > _LONGEST_TEXT:
        raise RowError(
            f"field {field!r}: has {len(text):,} characters; more than {_LONGEST_TEXT:,} are taken for a mistake"
        )
    if not text.strip():
        raise RowError(f"field {field!r}: the {name} is empty")


def _check_prompt_roles(prompt: list[Message]) -> None:
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] != "user":
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


def _hh(row: Row) -> tuple[Any, Any, Any]:
    chosen = parse_transcript(_string(row, "chosen"), "chosen")
    rejected = parse_transcript(_string(row, "rejected"), "rejected")
    return _split_shared(chosen, rejected)


def _prompt_pair(row: Row) -> tuple[Any, Any, Any]:
    prompt, chosen, rejected = (_string(row, field) for field in ("prompt", "chosen", "rejected"))
    system = _system(row)
    if prompt.lstrip().startswith("Human:"):
        messages = parse_transcript(prompt, "prompt")
        if messages[-1] == {"role": "assistant", "content": ""}:  # "…\n\nAssistant:" asks for the answer that follows
            messages.pop()
    elif system:
        messages = [{"role": "user", "content": prompt}]
    else:
        return prompt, chosen, rejected
    return system + messages, _assistant(chosen), _assistant(rejected)


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text.strip()}]


def _system(row: Row) -> list[Message]:
    text = _string(row, "system", default="")
    return [{"role": "system", "content": text}] if text.strip() else []


def _one_turn(question: str, row: Row) -> tuple[Any, Any, Any]:
    messages = [*_system(row), {"role": "user", "content": question}]
    return messages, _assistant(_string(row, "chosen")), _assistant(_string(row, "rejected"))


def _alpaca(row: Row) -> tuple[Any, Any, Any]:
    extra = _string(row, "input", default="")
    question = _string(row, "instruction") + (f"\n\n{extra}" if extra.strip() else "")
    return _one_turn(question, row)


def _orca(row: Row) -> tuple[Any, Any, Any]:
    return _one_turn(_string(row, "question"), row)


def _messages(row: Row) -> tuple[Any, Any, Any]:
    chosen, rejected = (_message_list(row, field) for field in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        turns = _message_list(row, "prompt")
        return turns, _without_prompt(turns, chosen), _without_prompt(turns, rejected)
    if len(chosen) > 1 or len(rejected) > 1:  # they repeat the prompt (ultrafeedback_binarized)
        return _split_shared(chosen, rejected)
    return [*_system(row), {"role": "user", "content": _string(row, "prompt")}], chosen, rejected


def _without_prompt(prompt: list[Message], completion: list[Message]) -> list[Message]:
    return completion[len(prompt) :] if completion[: len(prompt)] == prompt else completion


def _message_list(row: Row, field: str) -> list[Message]:
    return _turns(row, field, "role", "content", _ROLES)


def _turns(row: Row, field: str, role_key: str, text_key: str, roles: dict[str, str]) -> list[Message]:
    """The messages in `field`; ShareGPT's answers may be one object instead of a list."""
    if field not in row:
        raise RowError(f"column {field!r} is missing; columns are {columns_of(row)}")
    value = row[field]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(
            f"field {field!r}: must be a list of messages, not {'an empty one' if value == [] else kind_of(value)}"
        )
    return [
        _message(item, f"field {field!r}, message {number}", role_key, text_key, roles)
        for number, item in enumerate(value, 1)
    ]


def _message(item: Any, where: str, role_key: str, text_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where}: must be an object with {role_key!r} and {text_key!r}, not {kind_of(item)}")
    for key in (role_key, text_key):
        if key not in item:
            raise RowError(f"{where}: {key!r} is missing")
        if not isinstance(item[key], str):
            raise RowError(f"{where}: {key!r} must be text, not {kind_of(item[key])}")
    if item[role_key] not in roles:
        raise RowError(
            f"{where}: {role_key!r} must be one of {', '.join(roles)}, not {item[role_key][:_NAME_LENGTH]!r}"
        )
    return {"role": roles[item[role_key]], "content": item[text_key]}


def _sharegpt(row: Row) -> tuple[Any, Any, Any]:
    prompt, chosen, rejected = (
        _turns(row, field, "from", "value", _SHAREGPT_ROLES) for field in ("conversations", "chosen", "rejected")
    )
    return (prompt if prompt[0]["role"] == "system" else _system(row) + prompt), chosen, rejected


_CONVERTERS: dict[str, Callable[[Row], tuple[Any, Any, Any]]] = {
    "hh": _hh,
    "prompt_pair": _prompt_pair,
    "alpaca": _alpaca,
    "orca": _orca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
FORMATS = tuple(_CONVERTERS)


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
