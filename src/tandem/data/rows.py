"""A row of a data set while it is read: its fault, if it has one, and which of its parts are still unread."""

from collections.abc import Iterator
from typing import Any, TypeVar

Row = dict[str, Any]
Item = TypeVar("Item")

_LISTED = 40
_NAMES_SHOWN, _NAME_LENGTH = 12, 40  # of columns in a message; a hostile file can have any number of any length


class RowError(Exception):
    """What is wrong with one row, beginning with the field at fault; the reader adds file and row number."""


class TrackedRow(Row):
    """A row that knows which of its columns were read, and what was left unread inside of them.

    Attributes:
        read: columns that a format has asked for.
        inside: keys of messages and their parts that no template knows, as `.key` → a value.
        changed: what was done to its texts.
        why: why a column is unread, in words, where there is a reason.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.read: set[str] = set()
        self.inside: dict[str, Any] = {}
        self.changed: set[str] = set()
        self.why: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a dict's; the column counts as read."""
        self.read.add(name)
        return super().get(name, default)

    def peek(self, name: str) -> Any:
        """The value of a column, which does not count as read."""
        return super().__getitem__(name)

    def unread(self) -> dict[str, Any]:
        """Columns with a value that nobody has read, and the keys of messages."""
        columns = {name: value for name, value in self.items() if name not in self.read and has_value(value)}
        return columns | self.inside


def given_up(items: list[Item]) -> Iterator[Item]:
    """The items of a list, which is empty afterwards: what was made of many rows needs no memory beside the rows."""
    items.reverse()
    while items:
        yield items.pop()


def has_value(value: Any) -> bool:
    """Whether there is anything in `value`: neither null, nor empty, nor a struct or list of such."""
    if isinstance(value, dict):
        return any(map(has_value, value.values()))
    if isinstance(value, list):
        return any(map(has_value, value))
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value == value  # nan, which pandas writes for nothing


def leaves(value: Any) -> Iterator[str]:
    """Every text inside of `value`, the names of an object's keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)


def kind_of(value: Any) -> str:
    """What `value` is, in the words of JSON, for messages."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def columns_of(row: Row) -> str:
    """The names of `row`'s columns, for messages."""
    names = [str(name)[:_NAME_LENGTH] for name in list(row)[:_NAMES_SHOWN]]
    return ", ".join([*names, f"and {len(row) - len(names)} more"] if len(row) > len(names) else names) or "none"


def listed(names: list[str], between: str = ", ") -> str:
    """Names in one line, of which a hostile file can have any number."""
    more = [f"and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return between.join(names[:_LISTED] + more)


def shorten(name: Any) -> str:
    """A name from a data set, for messages."""
    return str(name)[:_NAME_LENGTH]
