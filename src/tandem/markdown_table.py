"""Markdown tables, which read well on a console too."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table with `header` as its first line and a line for each of `rows`.

    A `|` in a cell is escaped and a line break becomes a space, so that neither breaks the table.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
