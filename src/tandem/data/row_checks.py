"""Checks of a single preference pair. Each gives what it found, or None."""

import functools
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from tandem.data.formats import Row
from tandem.data.messages import answer_text

# Linear in the text: every repetition is bounded, and none follows another of the same characters
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,4}"  # international
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}"  # (212) 555-0100
    r"|(?:1[ .-])?\d{3}([ .-])\d{3}\1\d{4}"  # 212-555-0100, 1-800-555-0100
    r")(?![\w-]|\.\d)"
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_SECRET = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,255}|hf_[A-Za-z0-9]{30,100}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,200})|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
)

# C0 and C1 controls but tab, line feed and carriage return; what a decoder puts for bytes it cannot read; noncharacters
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufdd0-\ufdef\ufffe\uffff]")
# UTF-8 that was read as Windows-1252: â€™ for ’, Ã© for é
_MOJIBAKE = re.compile("â€[\u0080-\u009f™œ\u009d˜“”¦]|Ã[\u0080-\u00bf©¨¶¼¤±]")
_TURN_MARKER = re.compile(r"\n\s*(?:Human|Assistant|User|AI):")
_SENTENCE = 8  # words from which a line should end like a sentence
# What other chat templates put around a user's words
_TEMPLATE_MARKS = re.compile(
    r"\[/?INST\]|<<SYS>>|<(?:start|end)_of_turn>|<\|(?:im_start|im_end|user|assistant|start_header_id|eot_id|start)\|>"
    r"|^#{2,3} ?(?:Instruction|Response|Human|Assistant|User) ?:"
    r"|^(?:USER|User|Human): [^\n]*\n*(?:ASSISTANT|Assistant):",
    re.MULTILINE,
)
_NO_VALUE = {"nan", "null", "none", "<na>", "#n/a", "nat"}  # as pandas, SQL and spreadsheets write it
_MIN_ECHO = 30  # characters from which a prompt found in an answer is no accident


def texts(row: Row) -> Iterator[tuple[str, str]]:
    """The name and the text of each part of a canonical row."""
    for part in ("prompt", "chosen", "rejected"):
        yield part, answer_text(row[part])


def check_row(row: Row) -> dict[str, str]:
    """Findings of one canonical row: name → what was found."""
    return {name: found for name, check in ROW_CHECKS.items() if (found := check(row)) is not None}


def _identical(row: Row) -> str | None:
    chosen, rejected = (" ".join(answer_text(row[side]).split()) for side in ("chosen", "rejected"))
    if chosen != rejected:
        return None
    return "the same text" if row["chosen"] == row["rejected"] else "the same but for white space"


def _role_order(row: Row) -> str | None:
    if isinstance(row["prompt"], str):
        return None
    for part in ("prompt", "chosen", "rejected"):
        roles = [turn["role"] for turn in row[part]]
        for left, right in itertools.pairwise(roles):
            if left == right:
                return f"{part} has two turns of the {left} in a row"
    if row["prompt"][0]["role"] == "assistant":
        return "prompt begins with the assistant's turn"
    return None


def _several_turns(row: Row) -> str | None:
    turns = max(len(row[side]) if isinstance(row[side], list) else 1 for side in ("chosen", "rejected"))
    return f"{turns} turns in an answer" if turns > 1 else None


def _turn_markers(row: Row) -> str | None:
    for side in ("chosen", "rejected"):
        if found := _TURN_MARKER.search(answer_text(row[side])):
            return f"{side} holds {found.group().strip()!r}"
    return None


def _prompt_repeated(row: Row) -> str | None:
    asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    asked = " ".join(asked.split()).lower()
    if len(asked) < _MIN_ECHO:
        return None
    sides = [side for side in ("chosen", "rejected") if asked in " ".join(answer_text(row[side]).split()).lower()]
    return f"in {' and '.join(sides)}" if sides else None


def _wrapped_prompt(row: Row) -> str | None:
    turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
    found = next((hit for turn in turns if (hit := _TEMPLATE_MARKS.search(turn))), None)
    return f"{found.group()[:40]!r}" if found else None


def _score_order(row: Row) -> str | None:
    scores = row.get("scores")
    if not scores or scores[0] > scores[1]:
        return None
    return f"chosen {scores[0]:g}, rejected {scores[1]:g}"


def _missing_value(row: Row) -> str | None:
    found = [f"{part} is {text.strip()!r}" for part, text in texts(row) if text.strip().lower() in _NO_VALUE]
    return ", ".join(found) or None


def _unfinished(row: Row) -> str | None:
    sides = [side for side in ("chosen", "rejected") if _stops_short(answer_text(row[side]))]
    return f"{' and '.join(sides)}: …{answer_text(row[sides[0]]).rstrip()[-40:]!r}" if sides else None


def _stops_short(text: str) -> bool:
    """Whether prose, rather than a word or a list, ends without the end of a sentence."""
    last_line = text.rstrip().rpartition("\n")[2]
    return len(last_line.split()) >= _SENTENCE and (last_line[-1].isalnum() or last_line[-1] in ",;-(")


def _not_text(row: Row) -> str | None:
    for part, text in texts(row):
        if found := _NOT_TEXT.search(text):
            return f"{part} holds U+{ord(found.group()):04X}"
        if found := _MOJIBAKE.search(text):
            return f"{part} holds {found.group()!r}: UTF-8 that was read as another encoding"
    return None


def _personal_data(row: Row) -> str | None:
    whole = "\n\n".join(text for _, text in texts(row))
    found = sorted({f"{kind} {mask(text)}" for kind, text in personal_data(whole)})
    return ", ".join(found[:5]) or None


def personal_data(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of everything in `text` that looks like personal data or a secret."""
    for kind, (pattern, needs, is_real) in _PERSONAL.items():
        if needs.search(text):
            yield from ((kind, found.group()) for found in pattern.finditer(text) if is_real(found.group()))


def mask(text: str) -> str:
    """A personal datum with only as much left as it takes to find it."""
    return text[:2] + "…" + text[-2:]


def passes_luhn(text: str) -> bool:
    """Whether the digits of `text` have the check digit of a payment card (ISO/IEC 7812-1)."""
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether `text` has the check digits of an IBAN (ISO 13616: mod 97)."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def _is_public_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _always(text: str) -> bool:
    return True


_DIGITS = re.compile(r"\d\d")
# Kind → the pattern that finds it, a cheap test whether to search at all, and a check that tells it from other numbers
_PERSONAL: dict[str, tuple[re.Pattern[str], re.Pattern[str], Callable[[str], bool]]] = {
    "email": (_EMAIL, re.compile("@"), _always),
    "phone": (_PHONE, _DIGITS, _always),
    "payment card": (_CARD, _DIGITS, passes_luhn),
    "IPv4 address": (_IPV4, re.compile(r"\d\.\d"), _is_public_address),
    "IPv6 address": (_IPV6, re.compile(":[0-9A-Fa-f]{0,4}:"), _is_public_address),
    "IBAN": (_IBAN, re.compile(r"[A-Z]{2}\d\d"), is_iban),
    "social security number": (_SSN, _DIGITS, _always),
    "secret key": (_SECRET, re.compile("[-_A][A-Za-z0-9_-]{9}"), _always),
}

ROW_CHECKS: dict[str, Callable[[Row], str | None]] = {
    "identical": _identical,
    "role_order": _role_order,
    "several_turns": _several_turns,
    "turn_markers": _turn_markers,
    "prompt_repeated": _prompt_repeated,
    "wrapped_prompt": _wrapped_prompt,
    "score_order": _score_order,
    "missing_value": _missing_value,
    "unfinished": _unfinished,
    "not_text": _not_text,
    "personal_data": _personal_data,
}


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language(row: Row) -> str | None:
    """ISO 639-1 code of the language of the answers, or None where they are too short or too mixed to tell.

    py3langid (Lui & Baldwin 2012), on the first 200 characters of each answer.
    """
    text = " ".join(answer_text(row[side])[:200] for side in ("chosen", "rejected"))
    if sum(char.isalpha() for char in text) < 60:
        return None
    code, probability = _identifier().classify(text)
    return str(code) if probability > 0.9 else None
