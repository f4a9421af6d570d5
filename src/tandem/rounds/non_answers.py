"""Answers that are none: they are counted, and get no score."""

import re
from collections.abc import Mapping
from typing import Any

EMPTY, CUT_OFF, UNCLOSED_THINK, NOT_TEXT = "empty", "cut_off", "unclosed_think", "not_text"
BY_REASON = {"length": CUT_OFF, "content_filter": "filtered", "refused": "refused_by_server"}

_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file of pairs may hold


def non_answer(record: Mapping[str, Any]) -> str | None:
    """Why a record's `text` is no answer, or None where it is one.

    Reasoning that was closed and followed by nothing is `empty`. What the limit of tokens ended is `cut_off`, and
    what a server's content filter ended `filtered`, as `finish_reason` says, where it is there.
    """
    text, reason = record["text"], record.get("finish_reason") or ""
    if _NOT_TEXT.search(text):
        return NOT_TEXT
    rest = text.rpartition("</think>")[2]
    if "<think>" in rest:
        return UNCLOSED_THINK
    if not rest.strip() and reason not in BY_REASON:
        return EMPTY
    return BY_REASON.get(reason)
