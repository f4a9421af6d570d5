"""Finds the parts of a row that are missing in the text a chat template made of it. A lost part is refused; one that
templates leave out on purpose is reported.

On purpose, templates leave out the reasoning of earlier turns, the ids of tool calls, or the name of a tool beside its
result.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from tandem.data.messages import PARTS, REASONING, Message
from tandem.data.rows import Row, leaves

DROPPED = "tandem: the system message is dropped"  # in a template that `--system_prompt drop` made
_CALLED = "function"  # the `type` of every call and every tool
_SHOWN = 60  # characters of a text in a message
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # transformers' own tag
_THOUGHT_ENDS = "</think>"


def lost_parts(row: Row, side: str, text: str, template: str = "") -> Iterator[str]:
    """What of a row's prompt and of one answer must be in `text`, as it was rendered, and is not: in words."""
    prompt, answer = row["prompt"], row[side]
    for message in prompt:
        content = message["content"].rpartition(_THOUGHT_ENDS)[2]
        if message["role"] == "system" and DROPPED in template:
            continue
        yield from _missing(text, f"{message['role']} message", content)
        yield from _lost_calls(text, message)
    for message in answer:
        yield from _missing(text, f"{message['role']} message of {side}", message["content"])
        for name in REASONING:
            yield from _missing(text, f"{name} of {side}", message.get(name, ""))
        yield from _lost_calls(text, message)
    for tool in row.get("tools") or ():
        yield from _missing(text, "tool", str(tool.get("function", tool).get("name", "")))


def left_out(row: Row, side: str, text: str, template: str = "") -> set[str]:
    """Names of the parts of a rendered row that may be, and are, in `text` nowhere: `.tool_calls[].id`, …"""
    if isinstance(row["prompt"], str):
        return set()
    keywords = row.get("chat_template_kwargs") or {}
    names = {f"chat_template_kwargs.{name}" for name in keywords if not _is_read(name, keywords[name], text, template)}
    for message in row["prompt"]:
        if message["role"] == "system" and not _is_in(text, message["content"]):
            names.add("system messages, as --system_prompt drop asks")
        thought, end, _ = message["content"].rpartition(_THOUGHT_ENDS)
        if end and not _is_in(text, thought.rpartition("<think>")[2]):
            names.add("thoughts of earlier turns")
    given: list[tuple[str, Any]] = [("tools", row.get("tools"))]
    for message in row["prompt"] + row[side]:
        given += [(f".{name}", message[name]) for name in PARTS if name in message]
    placed = [found for name, value in given for found in _placed(value, name)]
    return names.union(path for path, part in placed if part != _CALLED and not _is_in(text, part))


def _is_read(name: str, value: Any, text: str, template: str) -> bool:
    """Whether a template reads a keyword; one whose name it gives to something else as well shows it in its text."""
    if name not in _asked_for(template):
        return False
    return name not in _set_by(template) or all(_is_in(text, part) for part in leaves(value))


@functools.cache
def _set_by(template: str) -> frozenset[str]:
    """Names that a template gives values of its own, so that a keyword of that name may be none that it reads."""
    return frozenset(re.findall(r"\{%-?\s*set\s+(\w+)", template))


@functools.cache
def _asked_for(template: str) -> frozenset[str]:
    """Keywords that a template reads."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except TemplateSyntaxError:  # of a dialect that rendering itself will judge
        return frozenset(re.findall(r"\w+", template))


def _placed(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text inside of `value`, and the names of keys on the way to it."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _placed(part, f"{path}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from _placed(part, f"{path}[]")


def _lost_calls(text: str, message: Message) -> Iterator[str]:
    if message["role"] != "tool":
        yield from _missing(text, f"name of a {message['role']} message", message.get("name", ""))
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        for part in (function["name"], *leaves(function["arguments"])):
            yield from _missing(text, "tool call", part)


def _missing(text: str, what: str, part: str) -> Iterator[str]:
    if not _is_in(text, part):
        yield f"the {what} ({part.strip()[:_SHOWN]!r})"


def _is_in(text: str, part: str) -> bool:
    """Whether `part` is in a rendered text, as it is or as JSON writes it."""
    part = part.strip()
    if not part or part in text:
        return True
    return any(json.dumps(part, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (True, False))
