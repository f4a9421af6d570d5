"""Columns besides prompt and answers: each is read into the pair, left out and named, or refused; none vanishes."""

from collections.abc import Collection, Mapping
from typing import Any

from tandem.data.messages import Message, parse_json, read_turns, unserialized, without_nulls
from tandem.data.rows import Row, RowError, TrackedRow, has_value, kind_of, leaves, shorten

PROMPTS = ("prompt", "question", "instruction", "query", "conversations")  # columns that can each be the prompt
_PROMPT_OF = {"alpaca": "instruction", "orca": "question", "sharegpt": "conversations", "hh": ""}
_SYSTEMS = ("system", "system_prompt", "system_message")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Columns that always belong to the prompt, and that no format has as they are
_CONTEXT = (
    "input", "context", "contexts", "document", "documents", "passage", "passages", "background", "knowledge",
    "evidence", "system_instruction", "dialogue", "conversation", "functions",
)  # fmt: skip
_MESSAGE_COLUMNS = {"prompt", "chosen", "rejected", "conversations", "history"}
_MAY_BE_JSON = ("prompt", "chosen", "rejected", "conversations", "history")


def arrange(
    row: Row, keys: Mapping[str, str], data_format: str | None, ignored: Collection[str]
) -> tuple[Row, dict[str, tuple[Any, str]]]:
    """`row` with its columns under the names that formats know; and by name, what options leave out, and why.

    Args:
        keys: a format's own name of a column → the file's.
        data_format: the format that the user has named, if any.
        ignored: names of columns, and of messages' keys with a dot before them.

    Raises:
        RowError: a list that Python's own notation wrote as text.
    """
    kept = {name: value for name, value in row.items() if name not in keys.values()}
    kept |= {name: row[key] for name, key in keys.items()}
    replaced = [name for name in keys if name in row and name not in keys.values()]
    aside = {name: (row[name], "another column was named for it") for name in replaced}
    own = next((name for name in PROMPTS if name in keys), None)
    if own is None and data_format is not None:
        own = _PROMPT_OF.get(data_format, "prompt")
    if own in kept or own == "":
        others = [name for name in PROMPTS if name != own and name in kept]
        aside |= {name: (kept.pop(name), "another prompt was named") for name in others}
    why = "left out by --ignore_columns"
    aside |= {name: (kept.pop(name), why) for name in ignored if name in kept}
    for key in {name.removeprefix(".") for name in ignored if name.startswith(".")}:
        for name in _MESSAGE_COLUMNS & kept.keys():
            kept[name], found = _without_key(kept[name], key)
            aside[f".{key}"] = (found, why) if has_value(found) else aside.get(f".{key}", (None, why))
    aside = {name: found for name, found in aside.items() if has_value(found[0])}
    return unserialized(kept, _MAY_BE_JSON), aside


def _without_key(value: Any, key: str) -> tuple[Any, Any]:
    """Messages without one of their keys, and the first value that it had."""
    if not isinstance(value, list):
        return value, None
    found = [item[key] for item in value if isinstance(item, dict) and has_value(item.get(key))]
    kept = [
        {name: part for name, part in item.items() if name != key} if isinstance(item, dict) else item for item in value
    ]
    return kept, found[0] if found else None


def with_line_feeds(value: Any) -> Any:
    """`value` with a line feed in place of every CRLF, Windows' line end, in all of its texts."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n")
    if isinstance(value, dict):
        return {name: with_line_feeds(part) for name, part in value.items()}
    return [with_line_feeds(part) for part in value] if isinstance(value, list) else value


def refuse_media(row: TrackedRow) -> None:
    """Refuse images, audio and video.

    Raises:
        RowError: such a column that is not empty.
    """
    for field in _MEDIA:
        if field in row and has_value(row.peek(field)):
            raise RowError(f"field {field!r}: is not empty, and Tandem trains on text only")


def add_context(row: TrackedRow, prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any, Row]:
    """The parts of a pair with the context that is in other columns of `row`; text becomes messages where needed.

    Returns:
        prompt, chosen, rejected, and `tools` and `chat_template_kwargs` where the row has them.

    Raises:
        RowError: two system messages, or a column of another kind than it should be.
    """
    system, history = _system(row), _history(row)
    extras = {name: value for name, value in (("tools", _tools(row)), ("chat_template_kwargs", _kwargs(row))) if value}
    if (system or history or extras) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    if isinstance(prompt, list):
        prompt = _with_system(system, history, prompt)
        chosen, rejected = (_stripped(row, turns) for turns in (chosen, rejected))
    return prompt, chosen, rejected, extras


def _stripped(row: TrackedRow, turns: list[Message]) -> list[Message]:
    """An answer without the white space around its turns, in every format: a template adds its own."""
    stripped = [turn | {"content": turn["content"].strip()} for turn in turns]
    if stripped != turns:
        row.changed.add("white space around answers dropped")
    return stripped


def _system(row: TrackedRow) -> str:
    found = {name: row[name] for name in _SYSTEMS if name in row and has_value(row.peek(name))}
    for name, value in found.items():
        if not isinstance(value, str):
            raise RowError(f"field {name!r}: must be text, not {kind_of(value)}")
    if len(set(found.values())) > 1:
        raise RowError(f"columns {' and '.join(found)} both hold a system message: name it with --system_key")
    return next(iter(found.values()), "")


def _with_system(system: str, history: list[Message], prompt: list[Message]) -> list[Message]:
    own = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    turns = history + prompt[len(own) :]
    if not system:
        return own + turns
    if own and own[0]["content"].strip() not in ("", system.strip()):
        raise RowError(
            "field 'prompt': begins with a system message, and the column of system messages holds another; leave one "
            "out with --ignore_columns"
        )
    return [{"role": "system", "content": system}, *turns]


def _history(row: TrackedRow) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if "history" not in row or not has_value(row.peek("history")):
        return []
    value = parse_json(row["history"])
    if isinstance(value, list) and all(isinstance(pair, list) and _is_pair(pair) for pair in value):
        return [
            {"role": role, "content": text}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
        turns = read_turns(row, "history") if value is row.peek("history") else _parsed_turns(row, value)
        if turns[0]["role"] == "user" and turns[-1]["role"] == "assistant":
            return turns
    raise RowError(
        "field 'history': must be a list of [question, answer] pairs or of messages from a user's to an assistant's; "
        "leave it out with --ignore_columns history"
    )


def _parsed_turns(row: TrackedRow, value: Any) -> list[Message]:
    parsed = TrackedRow({"history": value})
    turns = read_turns(parsed, "history")
    row.inside |= parsed.inside
    return turns


def _is_pair(pair: list[Any]) -> bool:
    return len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)


def _tools(row: TrackedRow) -> list[Any]:
    if "tools" not in row or not has_value(row.peek("tools")):
        return []
    tools = without_nulls(parse_json(row["tools"]))
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise RowError("field 'tools': must be a list of JSON schemas, or such a list as JSON in a text")
    return tools


def _is_tool(tool: Any) -> bool:
    return isinstance(tool, dict) and bool(tool) and isinstance(tool.get("function", tool), dict)


def _kwargs(row: TrackedRow) -> Row:
    if "chat_template_kwargs" not in row or not has_value(row.peek("chat_template_kwargs")):
        return {}
    keywords = without_nulls(parse_json(row["chat_template_kwargs"]))
    if not isinstance(keywords, dict):
        raise RowError(f"field 'chat_template_kwargs': must be an object, not {kind_of(keywords)}")
    return dict(keywords)


def refuse_lost(row: TrackedRow, prompt: str | list[Message]) -> Row:
    """The columns of `row` that are not read, by name. Content that belongs to the prompt is refused.

    Raises:
        RowError: a second prompt, or a column that is part of the question.
    """
    unread = row.unread()
    contents = {prompt.strip()} if isinstance(prompt, str) else {turn["content"].strip() for turn in prompt}
    for name, value in unread.items():
        texts = [text.strip() for text in leaves(value) if text.strip()]
        if name in PROMPTS and texts:
            if all(text in contents for text in texts if name != "conversations" or len(text) > len("assistant")):
                row.why[name] = "the same as in the prompt"
                continue
            used = " or ".join(column for column in PROMPTS if column in row.read and column in row) or "the answers"
            raise RowError(
                f"columns {name!r} and {used!r} could both be the prompt: name it with --prompt_key (and --data_format "
                f"where the format is not found), or leave {name!r} out with --ignore_columns {name}"
            )
        if name in _CONTEXT and texts:
            if all(any(text in content for content in contents) for text in texts):
                row.why[name] = "it is in the prompt"
                continue
            raise RowError(
                f"field {name!r}: holds what no format reads ({shorten(texts[0])!r}…): append it to the prompt with "
                f"--input_key {name}, or leave it out with --ignore_columns {name}"
            )
    return unread
