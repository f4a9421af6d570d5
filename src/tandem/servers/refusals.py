"""What of a request a server refuses to know, by the words of its error. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SYSTEM = "system"  # among what is left out: the system message, which goes into the user's first
JSON_SCHEMA = "json_schema"  # a response_format of that type, in whose place json_object is sent, with the schema

_PARAMETERS = ("temperature", "top_p", "seed", "max_completion_tokens", "max_tokens", "max_output_tokens", "store")
_REFUSES = re.compile(
    r"unsupported|(?:not|n't|no longer) (?:\w+ )?(?:support|permit|allow|accept|valid|recogni|implement|known|take)"
    r"|unknown|unrecogni|unexpected|extra (?:input|field|param)|extra_forbidden|deprecated|removed|cannot find"
    r"|invalid[ _](?:\w+ )?(?:param|argument|field|key)|only .{0,40}(?:allow|support|accept)|ignored|not available"
    r"|not be (?:present|specified|set|used|given|provided)|(?:may|can) only be|is fixed|not configurable"
    r"|不支持|不允许|无法识别|未知|无效的?参数",
    re.IGNORECASE,
)
_NOT_BOTH = re.compile(r"cannot both|not both|mutually exclusive|only one of", re.IGNORECASE)
# TGI takes a top_p below 1 alone, and 1 is what it does without one
_BELOW_ONE = re.compile(r"top_?p\W.{0,20}must be.{0,20}< ?1(?:\.0)?\b", re.IGNORECASE)
# As llama-cpp-python's server, DeepSeek and Fireworks put it
_NO_JSON_SCHEMA = re.compile(
    r"response_format[^.]{0,80}(?:unavailable|literal_error|unsupported|not supported|invalid|must be|should be)"
    r"|json_schema[^.]{0,40}(?:unavailable|unsupported|not supported|invalid)|text' or 'json_object",
    re.IGNORECASE | re.DOTALL,
)
# A prompt that is too long is told by the names of the limits, too
_TOO_LONG = re.compile(r"context|too (?:long|large|many)|exceed|maximum|at most|reduce", re.IGNORECASE)
# The chat templates of Gemma 2 and of Mistral's first models know no system message; Google's server says it thirdly
_NO_SYSTEM = re.compile(
    r"system (?:role|message|prompt|instruction)s?[^.]{0,30}(?:not|n't|un)[ -]?(?:\w+ )?(?:support|allow|enable|accept)"
    r"|(?:not|n't|un)[ -]?(?:\w+ )?support[^.]{0,30}\bsystem\b|developer instruction is not enabled"
    r"|roles must alternate|only user and assistant roles",
    re.IGNORECASE,
)


def refused_parameter(body: Mapping[str, Any], said: str) -> str | None:
    """The parameter of `body` that a server refuses to know, by what it says with an error; else None.

    `SYSTEM` and `JSON_SCHEMA` are what it may refuse besides parameters.

    A value that it refuses, or a prompt, is the user's to mend: only words like "unsupported" or "unknown" count.
    """
    if _NO_SYSTEM.search(said) and _begins_with_system(body):
        return SYSTEM
    if _asks_for_schema(body) and _NO_JSON_SCHEMA.search(said):
        return JSON_SCHEMA
    if body.get("top_p") == 1.0 and _BELOW_ONE.search(said):
        return "top_p"
    if _NOT_BOTH.search(said):
        return next((name for name in ("top_p", "temperature") if _is_named(name, body, said)), None)
    if not _REFUSES.search(said):
        return None
    name = next((name for name in _PARAMETERS if _is_named(name, body, said)), None)
    return None if name is not None and name.startswith("max_") and _TOO_LONG.search(said) else name


def _asks_for_schema(body: Mapping[str, Any]) -> bool:
    asked = body.get("response_format")
    return isinstance(asked, Mapping) and asked.get("type") == JSON_SCHEMA


def _is_named(name: str, body: Mapping[str, Any], said: str) -> bool:
    """Whether a parameter was sent and is named, in snake case or in camel case."""
    camel = re.sub(r"_(\w)", lambda found: found[1].upper(), name)
    return name in body and re.search(rf"(?<![A-Za-z_])(?:{name}|{camel})(?![A-Za-z_])", said) is not None


def _begins_with_system(body: Mapping[str, Any]) -> bool:
    messages = body.get("messages", body.get("input"))
    return isinstance(messages, Sequence) and len(messages) > 1 and _is_system(messages[0])


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def folded(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """`messages` with a system message at their head put before what the user says first."""
    if len(messages) < 2 or not _is_system(messages[0]) or messages[1]["role"] != "user":
        return messages
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]
