"""Messages of a chat: the parts that today's chat templates render, and how a row's messages are read.

A message is a dict of `role` (system, user, assistant or tool), `content` (text, may be empty beside other parts), and
where the data have them `reasoning_content` (or `thinking`), `tool_calls`, `name` and `tool_call_id`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tandem.data.rows import RowError, TrackedRow, has_value, kind_of, leaves, shorten

Message = dict[str, Any]
EXTRAS = ("tools", "chat_template_kwargs")  # columns for the chat template beside messages


class Asked(list[Message]):
    """A prompt's messages (for most callers a plain list), with what else its row has for the chat template.

    Attributes:
        extras: `tools` and `chat_template_kwargs`, as a canonical row has them; empty without.
        place: file and row, for error messages; empty where they are not known.
    """

    def __init__(self, messages: Iterable[Message], extras: Mapping[str, Any] | None = None, place: str = "") -> None:
        super().__init__(messages)
        self.extras = {name: extras[name] for name in EXTRAS if extras.get(name)} if extras else {}
        self.place = place


def extras_of(prompt: list[Message]) -> dict[str, Any]:
    """What a prompt has for the chat template besides its messages; empty for a plain list."""
    return prompt.extras if isinstance(prompt, Asked) else {}


ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
TEXT_PARTS = ("reasoning_content", "thinking", "name", "tool_call_id")
REASONING = ("reasoning_content", "thinking")
PARTS = (*TEXT_PARTS, "tool_calls")
# Content that other trainers train on, and that the templates Tandem supports do not render
_MEDIA = ("function_call", "image", "images", "audio", "audios", "video", "videos", "refusal")
_PYTHON_LIST = re.compile(r"""\s*(?:array\()?(?:\[\s*)?\{\s*'(?:role|content|from|value)'\s*:""")
_JSON_LIST = re.compile(r"""\s*[\[{]\s*[\[{"]""")
_JSON_TWICE = re.compile(r"""\s*"\s*[\[{]\s*[\[{\\]""")
_TEXT_KINDS = ("text", "input_text", "output_text")  # of content parts, as chat completions and Responses name them


def read_turns(
    row: TrackedRow, field: str, role_key: str = "role", text_key: str = "content", roles: dict[str, str] | None = None
) -> list[Message]:
    """The messages in a column; ShareGPT's answers may be one object instead of a list.

    Raises:
        RowError: no list of messages, or one with a part that is not read.
    """
    if field not in row:
        from tandem.data.rows import columns_of

        raise RowError(f"column {field!r} is missing; columns are {columns_of(row)}")
    value = row[field]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(
            f"field {field!r}: must be a list of messages, not {'an empty one' if value == [] else kind_of(value)}"
        )
    return [
        _read_message(row, item, f"field {field!r}, message {number}", (role_key, text_key), roles or ROLES)
        for number, item in enumerate(value, 1)
    ]


def _read_message(row: TrackedRow, item: Any, where: str, keys: tuple[str, str], roles: dict[str, str]) -> Message:
    role_key, text_key = keys
    if not isinstance(item, dict):
        raise RowError(f"{where}: must be an object with {role_key!r} and {text_key!r}, not {kind_of(item)}")
    if role_key not in item:
        raise RowError(f"{where}: {role_key!r} is missing")
    role = item[role_key]
    if not isinstance(role, str):
        raise RowError(f"{where}: {role_key!r} must be text, not {kind_of(role)}")
    if role not in roles:
        raise RowError(f"{where}: {role_key!r} must be one of {', '.join(roles)}, not {shorten(role)!r}")
    parts = _read_parts(item, where)
    content = item.get(text_key)
    if content is None and parts:
        content = ""
    if text_key not in item and not parts:
        raise RowError(f"{where}: {text_key!r} is missing")
    for name, value in item.items():
        if name not in (role_key, text_key, *PARTS) and has_value(value):
            if name in _MEDIA:
                raise RowError(f"{where}: {name!r} is not empty, and no chat template here renders it")
            row.inside.setdefault(f".{name}", value)
    return {"role": roles[role], "content": _read_content(row, content, where, text_key), **parts}


def _read_content(row: TrackedRow, content: Any, where: str, text_key: str) -> str:
    """Text, or the texts and `text` parts of a list joined together."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise RowError(f"{where}: {text_key!r} must be text, not {kind_of(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict) or part.get("type") not in _TEXT_KINDS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowError(f"{where}: {text_key!r} has a part that is no text ({shorten(kind)})")
        texts.append(part["text"])
        for name, value in part.items():
            if name not in ("type", "text") and has_value(value):
                row.inside.setdefault(f".{text_key}[].{name}", value)
    return "".join(texts)


def _read_parts(item: dict[str, Any], where: str) -> Message:
    parts: Message = {}
    for name in TEXT_PARTS:
        value = item.get(name)
        if not has_value(value):
            continue
        if not isinstance(value, str):
            raise RowError(f"{where}: {name!r} must be text, not {kind_of(value)}")
        parts[name] = value
    if has_value(item.get("tool_calls")):
        parts["tool_calls"] = _read_calls(item["tool_calls"], where)
    return parts


def _read_calls(value: Any, where: str) -> list[Message]:
    """Tool calls with `arguments` as an object: templates write it as JSON themselves."""
    calls = parse_json(value)
    if not isinstance(calls, list):
        raise RowError(f"{where}: 'tool_calls' must be a list, not {kind_of(value)}")
    read = []
    for call in calls:
        call = without_nulls(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: each of 'tool_calls' must be an object with a function's name and arguments")
        function = function | {"arguments": parse_json(function.get("arguments", {}))}
        read.append(call | {"function": function} if "function" in call else function)
    return read


def parse_json(value: Any) -> Any:
    """The list or object that a text holds as JSON; anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any) -> Any:
    """`value` without the nulls that Arrow adds for keys which only other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def unserialized(row: dict[str, Any], columns: tuple[str, ...]) -> dict[str, Any]:
    """`row` with what JSON wrote as text read back, in columns that may hold messages.

    Raises:
        RowError: Python's own notation, which pandas writes and which no one can read back safely.
    """
    changed = {}
    for name in columns:
        value = row.get(name)
        if not isinstance(value, str):
            continue
        if _PYTHON_LIST.match(value):
            raise RowError(
                f"field {name!r}: is a Python list written as text, as pandas' to_csv does; write the data as "
                ".parquet or .jsonl (to_json), which keep lists"
            )
        parsed = parse_json(_unquoted(value)) if _JSON_LIST.match(value) or _JSON_TWICE.match(value) else value
        if parsed is not value and is_messages(parsed):
            changed[name] = parsed
    return {**row, **changed} if changed else row


def _unquoted(text: str) -> str:
    """What JSON in a text that was written as JSON again says."""
    if text.lstrip()[:1] != '"':
        return text
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return inner if isinstance(inner, str) else text


def is_messages(value: Any) -> bool:
    """Whether `value` is a list of messages, or of [question, answer] pairs; or one message."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, dict)
        and ({"role", "from"} & item.keys())
        and ({"content", "value", "tool_calls"} & item.keys())
        for item in items
    )


def message_texts(message: Message) -> Iterator[str]:
    """Every text of a message that a template should render."""
    yield message["content"]
    for name in PARTS:
        yield from leaves(message.get(name))


def answer_text(answer: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of an answer as it is counted, compared and shown to a judge: all of its turns, separated by empty
    lines."""
    return answer if isinstance(answer, str) else "\n\n".join(turn["content"] or "" for turn in answer)


def all_text(value: str | list[Message]) -> str:
    """All texts of a prompt or an answer together, those of tool calls too; it must not be empty."""
    return value if isinstance(value, str) else "".join(text for turn in value for text in message_texts(turn))
