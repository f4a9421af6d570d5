"""Removes the prompt from answers that begin with it, as some data sets write them."""

from collections.abc import Callable, Sequence
from typing import Any

from tandem.data.balance import Balance
from tandem.data.formats import as_messages, pair_id_of
from tandem.data.rows import Row, RowError

SIDES = ("chosen", "rejected")
_LONG = 16  # characters of a prompt with which two answers do not both begin by accident


def without_prompts(pairs: Sequence[Row], balance: Balance, refuse: Callable[[Row, RowError], Any]) -> list[Row]:
    """The pairs, without the prompt at the beginning of `chosen` or of `rejected` where all of that side begin with it.

    Where only some do, a row both of whose answers begin with a prompt that is a question or of some length, or any
    that does where most do, goes to `refuse` and is left out.
    """
    repeats = {side: [_rest(pair, side) for pair in pairs] for side in SIDES}
    share = {side: sum(rest is not None for rest in repeats[side]) / max(1, len(pairs)) for side in SIDES}
    kept = []
    for number, pair in enumerate(pairs):
        rests = {side: repeats[side][number] for side in SIDES}
        partly = [side for side in SIDES if rests[side] is not None and share[side] < 1]
        if any(share[side] > 0.5 for side in partly) or (len(partly) == len(SIDES) and _is_telling(pair)):
            refuse(
                pair,
                RowError(
                    f"field {partly[0]!r}: begins with the prompt, which would be trained as its answer, and other "
                    "rows do not: take it out, or leave the row out with --max_bad_rows"
                ),
            )
            continue
        if stripped := {side: rest for side, rest in rests.items() if rest is not None and share[side] == 1}:
            pair = _with_answers(pair, stripped)
            for side in stripped:
                name = f"the prompt at the beginning of {side} dropped"
                balance.changed[name] = balance.changed.get(name, 0) + 1
        kept.append(pair)
    return kept


def _asked(pair: Row) -> str:
    return str(as_messages(pair["prompt"])[-1]["content"]).strip()


def _is_telling(pair: Row) -> bool:
    asked = _asked(pair)
    return len(asked) >= _LONG or asked.endswith("?")


def _rest(pair: Row, side: str) -> str | None:
    """What follows the prompt in an answer that begins with it; None where it does not, or nothing follows."""
    answer, asked = pair[side], _asked(pair)
    text = (answer if isinstance(answer, str) else str(answer[0]["content"])).lstrip()
    rest = text.removeprefix(asked)
    is_word = rest[:1].isalnum() and asked[-1:].isalnum()  # "Hi" and "High"
    return None if not asked or rest == text or is_word or not rest.strip() else rest


def _with_answers(pair: Row, answers: dict[str, str]) -> Row:
    changed = dict(pair)
    for side, rest in answers.items():
        if isinstance(pair[side], str):
            changed[side] = rest
        else:
            first, *others = pair[side]
            changed[side] = [first | {"content": rest.strip()}, *others]
    return changed | {"pair_id": pair_id_of(changed)}
