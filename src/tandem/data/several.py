"""A row with several rejected answers, which is as many pairs of one group; and a pair's weight and margin.

A group is trained as one row: its pairs share prompt and chosen answer, stay together in one micro-batch, and their
losses are summed (docs/data.md).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from tandem.data.rows import Row, RowError, has_value, kind_of
from tandem.data.scores import REJECTED_COLUMNS, number
from tandem.ranks import tell_once

NUMBERS = ("weight", "margin")
"""Columns that a pair is trained by: what its loss is multiplied by, and what its reward margin must exceed."""
TRAINED_BY = (*NUMBERS, "group")
"""Columns that pairs are trained by beside their tokens (`trained_by`)."""
_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", *NUMBERS)
_EACH = (*NUMBERS, *REJECTED_COLUMNS)  # columns that may have a value for each rejected answer


def one_by_one(row: Row) -> list[Row]:
    """The row once for each rejected answer: a list of texts, or of lists of messages; else the row as it is.

    Raises:
        RowError: a list that mixes the two, or a column of numbers with other than one for each answer.
    """
    answers = row.get("rejected")
    if not isinstance(answers, list) or not any(isinstance(answer, str | list) for answer in answers):
        return [row]
    if len({type(answer) for answer in answers}) > 1:
        kinds = " and ".join(dict.fromkeys(kind_of(answer) for answer in answers))
        raise RowError(f"field 'rejected': several answers must all be texts or all lists of messages, not {kinds}")
    shares: list[Row] = [{"rejected": answer} for answer in answers]
    for name in _EACH:
        values = row.get(name)
        if isinstance(values, list):
            if len(values) != len(answers):
                raise RowError(f"field {name!r}: has {len(values)} values for {len(answers)} answers in 'rejected'")
            shares = [share | {name: value} for share, value in zip(shares, values, strict=True)]
    return [row | share for share in shares]


def numbers_of(row: Row) -> dict[str, float]:
    """The weight and the margin of a pair, where it has them.

    Raises:
        RowError: not a finite number, or a weight below 0.
    """
    found = {}
    for name in NUMBERS:
        value = row.get(name)
        if not has_value(value):
            continue
        as_number = number(value)
        if as_number is None or (name == "weight" and as_number < 0):
            wanted = "a number of 0 or more" if name == "weight" else "a number"
            got = f"{value}" if as_number is not None else kind_of(value)
            raise RowError(
                f"field {name!r}: must be {wanted}, which pairs are trained by, not {got}; leave it out with "
                f"--ignore_columns {name}"
            )
        found[name] = as_number
    return found


def refuse_some(pairs: Sequence[Row], refuse: Callable[[Row, RowError], None]) -> list[Row]:
    """The pairs of a source, without those that lack a weight or a margin which others have: `refuse` is told."""
    kept = list(pairs)
    for name in NUMBERS:
        lacking = [pair for pair in kept if name not in pair]
        if 0 < len(lacking) < len(kept):
            for pair in lacking:
                refuse(pair, RowError(f"field {name!r}: is missing or empty, and other rows have it"))
            kept = [pair for pair in kept if name in pair]
    return kept


def as_rows(pairs: Sequence[Row]) -> list[list[Row]]:
    """Pairs in the rows that they are read from: those of one group together, each other alone."""
    keyed = enumerate(pairs)
    return [
        [pair for _, pair in each] for _, each in itertools.groupby(keyed, lambda item: item[1].get("group") or item[0])
    ]


def flat(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """The pairs of rows."""
    return list(itertools.chain(*rows))


def first_rows(pairs: list[Row], count: int | None) -> list[Row]:
    """The pairs of the first `count` rows; all for None."""
    return pairs if count is None else flat(as_rows(pairs)[:count])


def to_row(pairs: Sequence[Row]) -> Row:
    """The columns that are read to `pairs` again: to one, or to those of a prompt with several rejected answers."""
    rows = [{name: pair[name] for name in _COLUMNS if name in pair} | _scores(pair) for pair in pairs]
    if len(rows) == 1:
        return rows[0]
    return rows[0] | {name: [row[name] for row in rows] for name in ("rejected", *_EACH) if name in rows[0]}


def _scores(pair: Row) -> Row:
    return dict(zip(("score_chosen", "score_rejected"), pair.get("scores", ()), strict=False))


def unweighed(pairs: list[Row]) -> list[Row]:
    """The pairs as they are; a line on stderr says that measuring takes no notice of weights and margins."""
    if found := [name for name in NUMBERS if any(name in pair for pair in pairs)]:
        tell_once(f"{' and '.join(found)} of pairs are for training: here each pair counts once")
    return pairs


def trained_by(pairs: list[Row]) -> list[Row]:
    """The pairs, each with what it is trained by beside its tokens: a `weight` and a `margin` where any pair has one,
    and a `group`, a number that is equal within a row, where any row is several pairs.

    Sources of a mixture that have no weights get 1, and those without margins 0.
    """
    columns: dict[str, list[Any]] = {}
    for name, default in zip(NUMBERS, (1.0, 0.0), strict=True):
        if any(name in pair for pair in pairs):
            columns[name] = [pair.get(name, default) for pair in pairs]
    if any("group" in pair for pair in pairs):
        columns["group"] = [number for number, row in enumerate(as_rows(pairs)) for _ in row]
    if not columns:
        return pairs
    return [pair | {name: values[place] for name, values in columns.items()} for place, pair in enumerate(pairs)]
