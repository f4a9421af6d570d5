"""Tables as Markdown has them, which read well on a console too."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a line of `header` and a line for each of `rows`. A `|` or a new line in a cell stays in it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
