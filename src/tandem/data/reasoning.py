"""Reasoning in the text of an answer, in the notations that models have for it."""

import re

_NAME = r"(?:[\w.]{1,20}[:_])?(?:think(?:ing)?|thoughts?|reasoning|scratchpad)"  # also <seed:think>, <longcat_think>
_OPENS = rf"<(?i:{_NAME})(?:\s[^<>\n]{{0,80}})?>|\[THINK\]|◁think▷|<unused94>|<\|channel>thought\b"
_OPENS += r"|<\|(?i:start_thinking|begin_of_thought|think(?:ing)?)\|>"
_CLOSES = rf"</(?i:{_NAME})\s*>|\[/THINK\]|◁/think▷|<unused95>|<channel\|>"
_CLOSES += r"|<\|(?i:end_thinking|end_of_thought|/think(?:ing)?)\|>"
_TAG = rf"(?P<open>{_OPENS})|(?P<close>{_CLOSES})"
_IN_BLOCK = re.compile(_TAG)
_IN_TEXT = re.compile(
    rf"{_TAG}|(?P<empty><(?i:{_NAME})\s*/>)|(?P<fence>^[ \t]*(?P<marks>`{{3,}}|~{{3,}})[^\n]*$)|(?P<code>`[^`\n]+`)",
    re.M,
)
_FENCE_END = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*$", re.M)
_ALONE_ON_A_LINE = re.compile(rf"^[ \t]*(?:{_CLOSES})[ \t]*$", re.M)
_QUOTES = frozenset("`'\"“”‘’«»")

# What Cohere's, OpenThinker's and other models put around what follows their reasoning
_WRAPPERS = re.compile(
    r"<\|(?:START|END)_(?:RESPONSE|TEXT)\|>|<\|(?:begin|end)_of_solution\|>|\[(?:BEGIN|END) FINAL RESPONSE\]"
)
_WRAPPED = re.compile(r"<(answer|response|output|solution)>(.*)</\1>", re.S | re.I)

# OpenAI's harmony, with its special tokens and as a tokenizer decodes it without them
_HARMONY = re.compile(r"\s*(?:<\|start\|>\s*assistant\s*)?(?:<\|channel\|>)?\s*(?:analysis|commentary|final)[^<\n]*<\|")
_HARMONY_FINAL = re.compile(
    r"(?:<\|channel\|>|\A\s*)\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?:<\|(?:return|end|call|start)\|>|\Z)",
    re.S,
)
_BARE_HARMONY = re.compile(r"\s*(?:assistant)?analysis(?=[A-Z\"'“(\[*])")
_BARE_FINAL = "assistantfinal"

# Reasoning that plain words lead in: Granite 3.2, Apriel
_IN_WORDS = (
    (re.compile(r"\s*Here is my thought process:", re.I), re.compile(r"Here is my response:", re.I)),
    (re.compile(r"\s*Here are my reasoning steps:", re.I), re.compile(r"\[BEGIN FINAL RESPONSE\]")),
)


def without_reasoning(text: str) -> tuple[str, bool]:
    """What `text` says besides its reasoning, and whether a block of reasoning was never closed.

    A tag in code or between quotes is spoken of and marks nothing. Of blocks in blocks the outermost counts. Reasoning
    that ends and never began was begun by the chat template, in the prompt.
    """
    if _HARMONY.match(text) and "<|message|>" in text:
        finals = _HARMONY_FINAL.findall(text)
        return (finals[-1].strip() if finals else ""), not finals
    if _BARE_HARMONY.match(text):
        _, found, rest = text.rpartition(_BARE_FINAL)
        return (rest.strip() if found else ""), not found
    for begins, ends in _IN_WORDS:
        if led_in := begins.match(text):
            end = ends.search(text, led_in.end())
            return (_unwrapped(text[end.end() :]) if end else ""), end is None
    said, is_open, had_any = _without_blocks(text)
    return (_unwrapped(said) if had_any else said.strip()), is_open


def _unwrapped(text: str) -> str:
    text = _WRAPPERS.sub("", text).strip()
    whole = _WRAPPED.fullmatch(text)
    return whole[2].strip() if whole else text


def _without_blocks(text: str) -> tuple[str, bool, bool]:
    """The text without its blocks, whether the last one is open, and whether there were any."""
    said: list[str] = []
    at = looked = 0  # where what is not yet taken begins, and where the search goes on
    unclosed: dict[str, int] = {}  # by kind of fence, the length from which none is closed
    had_any = False
    while found := _IN_TEXT.search(text, looked):
        looked = found.end()
        if found["code"]:
            continue
        if found["fence"]:
            looked, stray = _after_fence(text, found, unclosed)
            if stray is None:
                continue
            said, at, looked, had_any = [], stray, stray, True
        elif found["empty"]:
            said.append(text[at : found.start()])
            at, had_any = looked, True
        elif _is_quoted(text, found):
            continue
        elif found["close"]:
            if not had_any or text[looked:].strip():  # a second one at the very end closes nothing
                said = []
            else:
                said.append(text[at : found.start()])
            at, had_any = looked, True
        else:
            said.append(text[at : found.start()])
            had_any = True
            end = _block_end(text, looked)
            if end is None:
                return "".join(said), True, True
            at = looked = end
    return "".join([*said, text[at:]]), False, had_any


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    before, after = text[max(tag.start() - 1, 0) : tag.start()], text[tag.end() : tag.end() + 1]
    return before in _QUOTES and bool(before) and after in _QUOTES and bool(after)


def _block_end(text: str, start: int) -> int | None:
    """Where the block that is open at `start` ends: with its last close where others were opened and left open."""
    depth, last = 1, None
    for tag in _IN_BLOCK.finditer(text, start):
        if _is_quoted(text, tag):
            continue
        depth += 1 if tag["open"] else -1
        if tag["close"]:
            last = tag.end()
            if depth == 0:
                return last
    return last


def _after_fence(text: str, fence: re.Match[str], unclosed: dict[str, int]) -> tuple[int, int | None]:
    """Where to go on after a fence, and where reasoning ends in the code behind it, if it does.

    It ends there with a tag alone on its line that no other in the code opens: code drafted while reasoning, whose
    fence was left open.
    """
    kind, length = fence["marks"][0], len(fence["marks"])
    if length >= unclosed.get(kind, len(text) + 1):
        return fence.end(), None
    for end in _FENCE_END.finditer(text, fence.end()):
        if end[1][0] == kind and len(end[1]) >= length:
            break
    else:
        unclosed[kind] = length
        return fence.end(), None
    for tag in _IN_BLOCK.finditer(text, fence.end(), end.start()):
        if tag["open"]:
            break
        line = _ALONE_ON_A_LINE.match(text, text.rfind("\n", 0, tag.start()) + 1)
        if line:
            return end.end(), tag.end()
    return end.end(), None
