"""Rows with one answer, which SFT takes beside pairs: a question and its answer, a conversation, a text.

Such a row is read as a pair whose two answers are the same, so that columns, roles, tools and parts of messages are
read by the same code as pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tandem.data.messages import unserialized
from tandem.data.rows import Row, RowError, columns_of, has_value, kind_of, leaves

if TYPE_CHECKING:
    from tandem.data.options import SFTDataOptions

Kind = Literal["completion", "conversation", "text"]

_QUESTIONS = ("prompt", "question", "instruction", "query")
_ANSWERS = ("completion", "output", "response", "answer")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_SIDES = ("chosen", "rejected")
_ASSISTANTS = ("assistant", "gpt", "model", "ai", "chatgpt")


@dataclass(frozen=True)
class Example:
    """A row in the form of a pair, and what it was before.

    Attributes:
        row: with `chosen` and `rejected`, which are both the answer.
        kind: of example; None for a row that is a pair.
        column: the answer's column in the file.
        among: for a pair of several rejected answers, which one it is of, in words; empty for an only one.
    """

    row: Row
    kind: Kind | None = None
    column: str = "chosen"
    among: str = ""

    def in_its_words(self, error: RowError) -> RowError:
        """`error` with the file's own column in place of the one that the row was read under."""
        if self.kind is None:
            return RowError(str(error).replace("field 'rejected'", f"field 'rejected'{self.among}"))
        return RowError(str(error).replace("'chosen'", repr(self.column)).replace("'rejected'", repr(self.column)))


def read_example(row: Row, options: "SFTDataOptions") -> Example:
    """A row as SFT reads it. A pair stays as it is; SFT takes its chosen answer.

    Raises:
        RowError: a row that is neither a pair nor any kind of example, or two that could be the answer.
    """
    completion, text = options.completion_key, options.text_key
    row = unserialized(row, _CONVERSATIONS)
    if completion is None and text is None and any(has_value(row.get(side)) for side in _SIDES):
        return Example(row)
    if text is not None:
        return _text(row, text)
    if (column := completion or _answer_column(row)) is not None:
        return Example(_paired(row, column, row[column]), "completion", column)
    filled = [name for name in _CONVERSATIONS if isinstance(row.get(name), list) and row[name]]
    if filled:
        return _conversation(row, filled[0])
    if "text" in row:
        return _text(row, "text")
    raise RowError(
        f"no known format of examples or of pairs has the columns {columns_of(row)}; name the answer's column with "
        "--completion_key and the question's with --prompt_key, or a text's with --text_key"
    )


def _answer_column(row: Row) -> str | None:
    """The column that holds the answer to a question in another column.

    Raises:
        RowError: several could be.
    """
    filled = [name for name in _ANSWERS if has_value(row.get(name))]
    if not filled or not any(has_value(row.get(name)) for name in _QUESTIONS):
        return None
    if len(filled) > 1:
        raise RowError(
            f"columns {' and '.join(map(repr, filled))} could both be the answer: name it with --completion_key"
        )
    return filled[0]


def _paired(row: Row, column: str, answer: object) -> Row:
    kept = {name: value for name, value in row.items() if name not in (column, *_SIDES)}
    if [name for name in _QUESTIONS if has_value(kept.get(name))] == ["query"]:  # of no format of pairs
        kept["prompt"] = kept.pop("query")
    return kept | dict.fromkeys(_SIDES, answer)


def _conversation(row: Row, column: str) -> Example:
    """A conversation split into the first question, and everything from the first answer on."""
    turns = row[column]
    roles = [turn.get("role", turn.get("from")) if isinstance(turn, dict) else None for turn in turns]
    first = next((place for place, role in enumerate(roles) if str(role).strip().lower() in _ASSISTANTS), None)
    if first is None:
        raise RowError(f"field {column!r}: has no assistant's turn, so nothing to learn")
    if first == 0:
        raise RowError(f"field {column!r}: begins with an assistant's turn, which answers nothing")
    asked = "conversations" if any("from" in turn for turn in turns if isinstance(turn, dict)) else "prompt"
    _refuse_lost(row, [asked], column)
    pair = _paired({name: row[name] for name in row if name != asked}, column, turns[first:])
    return Example(pair | {asked: turns[:first]}, "conversation", column)


def _refuse_lost(row: Row, names: Sequence[str], column: str) -> None:
    """Refuse a question in a column beside `column`, which should hold the whole example.

    Raises:
        RowError: there is one, and it is not part of the example.
    """
    said = [text.strip() for text in leaves(row[column])]
    for name in names:
        lost = (text.strip() for text in leaves(row.get(name)) if name != column)
        if any(not any(text in each for each in said) for text in lost):
            raise RowError(
                f"columns {name!r} and {column!r} could both be the prompt, and say different things: leave one out "
                "with --ignore_columns"
            )


def _text(row: Row, column: str) -> Example:
    text = row[column]
    if not isinstance(text, str):
        raise RowError(f"field {column!r}: must be text, not {kind_of(text)}")
    if not text.strip():
        raise RowError(f"field {column!r}: the text is empty")
    _refuse_lost(row, _QUESTIONS, column)
    kept = {name: value for name, value in row.items() if name not in (column, *_QUESTIONS, *_SIDES)}
    return Example(kept | dict.fromkeys(("prompt", *_SIDES), text), "text", column)
