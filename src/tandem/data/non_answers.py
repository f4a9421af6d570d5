"""Recognises answers that are none (empty, cut off, filtered), and removes a model's reasoning from its answer."""

import re
from collections.abc import Mapping
from typing import Any

from tandem.data.reasoning import without_reasoning

EMPTY, CUT_OFF, UNCLOSED_THINK, FILTERED, NOT_TEXT = "empty", "cut_off", "unclosed_think", "filtered", "not_text"
FAILED = "failed"

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file of pairs may hold
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060-\u2064\ufe0f\ufeff]*")
_WITHHELD = ("content_filter", "refused")  # reasons to finish


def spoken(text: str) -> str:
    """`text` without its closed blocks of reasoning, and without what an unclosed one holds."""
    return without_reasoning(text)[0].strip()


def non_answer(record: Mapping[str, Any]) -> str | None:
    """Why a record's `text` is no answer, or None where it is one.

    `empty`: there is no text, or none after closed reasoning. By the record's `finish_reason`, if it has one:
    `cut_off`, the limit of tokens ended it; `filtered`, a server refused or its content filter ended it; `failed`, a
    server failed on it repeatedly.
    """
    text = record["text"]
    if _NOT_TEXT.search(text):
        return NOT_TEXT
    reason = record.get("finish_reason")
    if reason in _WITHHELD:
        return FILTERED
    if reason == "failed":
        return FAILED
    said, is_open = without_reasoning(text)
    if is_open:
        return UNCLOSED_THINK
    if _INVISIBLE.fullmatch(said):
        return EMPTY
    return CUT_OFF if reason == "length" else None
