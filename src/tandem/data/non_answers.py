"""Answers that are none, and what a model says once its reasoning is taken away."""

import re
from collections.abc import Mapping
from typing import Any

EMPTY, CUT_OFF, UNCLOSED_THINK, FILTERED, NOT_TEXT = "empty", "cut_off", "unclosed_think", "filtered", "not_text"

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file of pairs may hold
_OPENS = r"(?<!`)(?:<think(?:ing)?>|\[THINK\])"  # in backticks it is quoted
_CLOSES = r"(?<!`)(?:</think(?:ing)?>|\[/THINK\])"
_CLOSED_BLOCK = re.compile(rf"(?:{_OPENS})(?:(?!{_OPENS}).)*?(?:{_CLOSES})", re.DOTALL | re.IGNORECASE)
# Some chat templates open the block in the prompt, so that the answer has its end alone
_TO_THE_END_OF_THE_BLOCK = re.compile(rf"\A.*(?:{_CLOSES})", re.DOTALL | re.IGNORECASE)
_OPEN = re.compile(_OPENS, re.IGNORECASE)


def spoken(text: str) -> str:
    """`text` without its closed blocks of reasoning, and without what an unclosed one holds."""
    while (rest := _CLOSED_BLOCK.sub("", text)) != text:  # from the inside out, where they are nested
        text = rest
    text = _TO_THE_END_OF_THE_BLOCK.sub("", text)
    opened = _OPEN.search(text)
    return (text[: opened.start()] if opened else text).strip()


def non_answer(record: Mapping[str, Any]) -> str | None:
    """Why a record's `text` is no answer, or None where it is one.

    Reasoning that was closed and followed by nothing is `empty`. What the limit of tokens ended is `cut_off`, and
    what a server's content filter ended, or it refused to answer, `filtered`, as `finish_reason` says, where it is
    there.
    """
    text = record["text"]
    if _NOT_TEXT.search(text):
        return NOT_TEXT
    reason = record.get("finish_reason")
    if reason in ("content_filter", "refused"):
        return FILTERED
    while (rest := _CLOSED_BLOCK.sub("", text)) != text:
        text = rest
    if _OPEN.search(_TO_THE_END_OF_THE_BLOCK.sub("", text)):
        return UNCLOSED_THINK
    if not spoken(text):
        return EMPTY
    return CUT_OFF if reason == "length" else None
