"""Streams of server-sent events, which some proxies send unasked, put together to one reply."""

import json
from collections.abc import Iterator, Mapping
from typing import Any


def is_stream(body: str) -> bool:
    """Whether `body` is a stream of events rather than JSON."""
    return body.lstrip().startswith(("data:", "event:", ": "))


def joined(body: str) -> dict[str, Any] | None:
    """The reply as it would have been sent in one piece; None where the events hold none."""
    events = list(_events(body))
    for event in reversed(events):
        response = event.get("response")
        if isinstance(response, dict) and "output" in response:
            return response  # the last event of the Responses API holds the whole reply
        if event.get("error"):
            return dict(event)
    chunks = [choice for event in events for choice in _choices(event)]
    if not chunks:
        return None
    message: dict[str, Any] = {"role": "assistant"}
    for name in ("content", "reasoning_content", "reasoning", "refusal"):
        pieces = [delta.get(name) for chunk in chunks if isinstance(delta := chunk.get("delta"), dict)]
        if told := "".join(piece for piece in pieces if isinstance(piece, str)):
            message[name] = told
    reasons = [chunk["finish_reason"] for chunk in chunks if chunk.get("finish_reason")]
    usages = [event["usage"] for event in events if event.get("usage")]
    # A stream without a finish_reason broke off
    choice = {"message": message, "finish_reason": reasons[-1] if reasons else "error"}
    return {"choices": [choice], "usage": usages[-1] if usages else None}


def _events(body: str) -> Iterator[Mapping[str, Any]]:
    for line in body.splitlines():
        if line.startswith("data:"):
            try:
                event = json.loads(line.removeprefix("data:"))
            except (ValueError, RecursionError):
                continue  # [DONE], or the last line of a stream that broke off
            if isinstance(event, dict):
                yield event


def _choices(event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    choices = event.get("choices")
    yield from (choice for choice in choices[:1] if isinstance(choice, dict)) if isinstance(choices, list) else ()
