"""Which part of a request a server does not support, by the words of its error. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Beside parameters, these may be refused (`dialects.body_of` says what is sent instead)
SYSTEM = "system"  # a system message
JSON_SCHEMA = "json_schema"  # a response_format of this type

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
# TGI takes only a top_p below 1; without one it uses 1
_BELOW_ONE = re.compile(r"top_?p\W.{0,20}must be.{0,20}< ?1(?:\.0)?\b", re.IGNORECASE)
# In the words of llama-cpp-python's server, DeepSeek and Fireworks
_NO_JSON_SCHEMA = re.compile(
    r"response_format[^.]{0,80}(?:unavailable|literal_error|unsupported|not supported|invalid|must be|should be)"
    r"|json_schema[^.]{0,40}(?:unavailable|unsupported|not supported|invalid)|text' or 'json_object",
    re.IGNORECASE | re.DOTALL,
)
# An error about a prompt that is too long also names the parameters of limits
_TOO_LONG = re.compile(r"context|too (?:long|large|many)|exceed|maximum|at most|reduce", re.IGNORECASE)
# In the words of servers, Google's among them ("developer instruction is not enabled"), and of the chat templates of
# Gemma 2 and Mistral's first models, which have no system message
_NO_SYSTEM = re.compile(
    r"system (?:role|message|prompt|instruction)s?[^.]{0,30}(?:not|n't|un)[ -]?(?:\w+ )?(?:support|allow|enable|accept)"
    r"|(?:not|n't|un)[ -]?(?:\w+ )?support[^.]{0,30}\bsystem\b|developer instruction is not enabled"
    r"|roles must alternate|only user and assistant roles",
    re.IGNORECASE,
)


def refused_parameter(body: Mapping[str, Any], said: str) -> str | None:
    """The parameter of `body`, `SYSTEM` or `JSON_SCHEMA` that a server's error says it does not support; else None.

    Only words like "unsupported" or "unknown" count: a parameter whose value is out of range, or a prompt that is too
    long, must not be left out silently; the user has to change it.
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
    """Whether a parameter was sent and the error names it, in snake case or camel case."""
    camel = re.sub(r"_(\w)", lambda found: found[1].upper(), name)
    return name in body and re.search(rf"(?<![A-Za-z_])(?:{name}|{camel})(?![A-Za-z_])", said) is not None


def _begins_with_system(body: Mapping[str, Any]) -> bool:
    messages = body.get("messages", body.get("input"))
    return isinstance(messages, Sequence) and len(messages) > 1 and _is_system(messages[0])


def _is_system(message: Mapping[str, Any]) -> bool:
    return message.get("role") in ("system", "developer")


def folded(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """`messages` with their system message, if they begin with one, moved into the user message that follows."""
    if len(messages) < 2 or not _is_system(messages[0]) or messages[1]["role"] != "user":
        return messages
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]
