"""Brings rows into the shapes that formats read: names of columns, roles and keys of messages, structs of lists.

Other names for the same thing are replaced by ours; nothing is left out here.
"""

from collections.abc import Mapping
from typing import Any

from tandem.data.columns import PROMPTS
from tandem.data.rows import Row, RowError, has_value, leaves

# Columns whose names are taken in any case and with blanks around them
_KNOWN = {
    *PROMPTS, "chosen", "rejected", "input", "system", "system_prompt", "history", "tools", "messages",
    "score_chosen", "score_rejected", "weight", "margin",
}  # fmt: skip
_OF_MESSAGES = ("prompt", "chosen", "rejected", "conversations", "history", "messages")
_SIDES = ("chosen", "rejected")
_ROLES = {
    "developer": "system", "human": "user", "model": "assistant", "gpt": "assistant", "ai": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
_CANONICAL = ("system", "user", "assistant", "tool")
_KEYS = (("role", "content"), ("from", "value"))


def known_names(row: Row, keys: Mapping[str, str]) -> Row:
    """`row` with the columns that formats know under their own names; those that `keys` names stay as they are."""
    renamed: dict[str, str] = {}
    for name in row:
        plain = name.strip().lower() if isinstance(name, str) else name
        if plain != name and plain in _KNOWN and plain not in row and name not in keys.values():
            renamed.setdefault(plain, name)
    if not renamed:
        return row
    names = {name: plain for plain, name in renamed.items()}
    return {names.get(name, name): value for name, value in row.items()}


def known_shape(row: Row, data_format: str | None) -> Row:
    """`row` with its messages as lists of `{"role", "content"}` (`{"from", "value"}` for ShareGPT), under known roles.

    Of several columns that could be the prompt, those without a value go, unless the user has named the format. A
    `messages` column that ends with the user's turn, before single answers, is the prompt.

    Raises:
        RowError: lists of roles and contents that do not go together.
    """
    row = {name: _messages(name, value) if name in _OF_MESSAGES else value for name, value in row.items()}
    if data_format is None:
        row = _with_prompt(row)
    if _is_turns(row.get("conversations")) and data_format in (None, "sharegpt"):
        if data_format is None and not all("from" in turn for turn in row["conversations"]):
            return _answers(_as_prompt(row, "conversations"), 0)
        return _answers(row, 1)
    if data_format in (None, "messages"):
        return _answers(row, 0)
    return row


def _with_prompt(row: Row) -> Row:
    filled = [name for name in PROMPTS if name in row and has_value(row[name])]
    if filled:
        return {name: value for name, value in row.items() if name not in PROMPTS or name in filled}
    turns: Any = row.get("messages")
    asks = _is_turns(turns) and _role(turns[-1]) == "user"
    if asks and all(_is_turns(row.get(side)) and _role(row[side][0]) == "assistant" for side in _SIDES):
        return _as_prompt(row, "messages")
    return row


def _as_prompt(row: Row, column: str) -> Row:
    """`row` with a column of messages as its prompt.

    Raises:
        RowError: there is a prompt already, which says something else.
    """
    contents = {str(text).strip() for turn in row[column] for text in leaves(turn)}
    asked = row.get("prompt")
    says_else = any(text.strip() not in contents for text in leaves(asked) if text.strip())
    if says_else or (has_value(asked) and not any(leaves(asked))):
        raise RowError(
            f"columns 'prompt' and {column!r} could both be the prompt: name it with --prompt_key, or leave one out "
            "with --ignore_columns"
        )
    return {("prompt" if name == column else name): value for name, value in row.items() if name != "prompt"}


def _role(turn: Any) -> str | None:
    return turn.get("role") or turn.get("from") if isinstance(turn, dict) else None


def _is_turns(value: Any) -> bool:
    """Whether `value` is a list of messages in one of the two notations."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and any(keys[0] in turn for keys in _KEYS) for turn in value)
    )


def _messages(column: str, value: Any) -> Any:
    """Messages under roles that formats know; anything else as it is."""
    if isinstance(value, dict):
        turns = _struct_of_lists(column, value)
        value = turns if turns is not None else [value] if _is_turns([value]) else value
    return [_known_role(turn) for turn in value] if _is_turns(value) else value


def _struct_of_lists(column: str, value: Row) -> list[Row] | None:
    """A struct of lists, which `datasets` once made of a list of structs, as that list; None if it is none.

    Raises:
        RowError: lists of different lengths.
    """
    lists = {name: part for name, part in value.items() if part is not None}
    if not any(isinstance(lists.get(role), list) and isinstance(lists.get(text), list) for role, text in _KEYS):
        return None
    if not all(isinstance(part, list) for part in lists.values()) or len({len(part) for part in lists.values()}) > 1:
        raise RowError(f"field {column!r}: its lists {', '.join(map(str, lists))} are not of one length")
    return [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]


def _known_role(turn: Row) -> Row:
    key = "role" if "role" in turn else "from"
    role = turn[key]
    if not isinstance(role, str) or role in _CANONICAL or (key == "from" and role in ("human", "gpt")):
        return turn
    plain = role.strip().lower()
    known = _ROLES.get(plain, plain)
    return {**turn, key: known} if known in _CANONICAL else turn


def _answers(row: Row, notation: int) -> Row:
    """`row` with all messages in one notation; answers that are text become messages where the prompt is a list."""
    role_key, text_key = _KEYS[notation]
    other_role, other_text = _KEYS[1 - notation]
    plain = all(isinstance(row.get(side), str) for side in _SIDES)
    plain = plain and any(_is_turns(row.get(name)) for name in ("prompt", "conversations"))
    changed: Row = {}
    for name in _OF_MESSAGES:
        value: Any = row.get(name)
        if _is_turns(value):
            changed[name] = [_in_notation(turn, (role_key, text_key), (other_role, other_text)) for turn in value]
        elif name in _SIDES and plain:
            changed[name] = [{role_key: "assistant", text_key: value}]
    return {**row, **changed}


def _in_notation(turn: Row, keys: tuple[str, str], others: tuple[str, str]) -> Row:
    if keys[0] in turn or others[0] not in turn:
        return turn
    names = dict(zip(others, keys, strict=True))
    renamed = {names.get(name, name): value for name, value in turn.items()}
    role = renamed.get("role")
    return renamed | {"role": _ROLES.get(role, role)} if isinstance(role, str) else renamed
