"""The scores that a row gives its two answers."""

import math
from typing import Any

from tandem.data.rows import Row, RowError, kind_of

# Columns of the scores of chosen and rejected, as data sets on the Hub call them
_COLUMNS = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"), ("chosen-rating", "rejected-rating"),
)  # fmt: skip
REJECTED_COLUMNS = tuple(rejected for _, rejected in _COLUMNS)


def scores_of(row: Row, *, needed: bool = False) -> tuple[Row, tuple[str, ...]]:
    """The scores of chosen and rejected as `scores`, and their columns; nothing where a row has not both as numbers.

    Raises:
        RowError: they are `needed`.
    """
    for names in _COLUMNS:
        found = [number(row.get(name)) for name in names]
        if None not in found:
            return {"scores": found}, names
    if not needed:
        return {}, ()
    known = next((name for names in _COLUMNS for name in names if name in row), None)
    what = f"field {known!r}: is {kind_of(row[known])}" if known else "has no scores"
    raise RowError(
        f"{what}: --min_score_margin needs numbers in both of {'; '.join(', '.join(names) for names in _COLUMNS)}"
    )


def number(value: Any) -> float | None:
    """A number, which a .csv writes as text; None for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
