"""Tool calls: in messages, put into the form of chat completions; in replies, put into the answer's text. Pure."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`messages` as a server takes them: each call has an id and its arguments as JSON, each result its call's id."""
    sent: list[Mapping[str, Any]] = []
    pending: list[str] = []  # ids of calls whose results are still to come
    for message in messages:
        if calls := message.get("tool_calls"):
            wired = [_call(call, f"call_{len(sent)}_{number}") for number, call in enumerate(calls)]
            pending = [call["id"] for call in wired]
            sent.append({**message, "tool_calls": wired})
        elif message["role"] == "tool" and "tool_call_id" not in message and pending:
            sent.append({**message, "tool_call_id": pending.pop(0)})
        else:
            sent.append(message)
    return sent


def _call(call: Mapping[str, Any], number: str) -> dict[str, Any]:
    function = dict(call.get("function", {name: call[name] for name in ("name", "arguments") if name in call}))
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or number, "type": "function", "function": function}


def call_texts(message: Mapping[str, Any]) -> Iterator[str]:
    """The tool calls of a reply as text, in the notation of Qwen's and Hermes' templates."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            with contextlib.suppress(ValueError):  # arguments that are not JSON are shown as the model wrote them
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            said = json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
            yield f"<tool_call>\n{said}\n</tool_call>"
