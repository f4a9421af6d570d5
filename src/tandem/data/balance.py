"""Keeps account of which columns and keys of a data set were read, and which were not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.data.rows import TrackedRow, has_value, kind_of, leaves, listed, shorten
from tandem.ranks import tell

# Columns that describe a pair without being part of it, by their names in widely used data sets
_ABOUT = {
    "id", "uid", "idx", "index", "uuid", "hash", "prompt_id", "pair_id", "question_id", "conversation_id", "source",
    "source_dataset", "dataset", "origin", "split", "url", "license", "created_at", "timestamp", "date", "language",
    "lang", "category", "categories", "subcategory", "subset", "topic", "task", "task_type", "type", "domain", "tags",
    "difficulty", "model", "models", "model_name", "chosen_model", "rejected_model", "model_chosen", "model_rejected",
    "chosen-model", "rejected-model", "judge", "annotator", "annotators", "worker", "row", "in", "status",
    "messages", "generations", "generation_models", "raw_generation_responses", "order", "generation_model",
}  # fmt: skip
_A_LINE = 8  # names in one line, which would be cut at 1,000 characters


@dataclass
class Unread:
    """A column or key that was not read.

    Attributes:
        count: rows that have a value there.
        kind: the kind of its values.
        why: the reason in words; empty if it is that no format has the column.
        varies: whether its text differs from row to row.
    """

    kind: str
    why: str
    count: int = 0
    varies: bool = False
    first: Any = field(default=None, repr=False)

    def add(self, value: Any) -> None:
        """Count one more value."""
        self.count += 1
        if self.count == 1:
            self.first = value
        elif not self.varies and any(True for _ in leaves(value)):
            self.varies = bool(value != self.first)


@dataclass
class Balance:
    """What became of every column and message key of one source's split.

    Attributes:
        place: the source and its split, for people.
        rows: how many rows were read.
        read: columns that are part of the pairs.
        unread: by name, the columns and keys that were not read; a key of messages begins with a dot.
        changed: by the change that was made to texts, the number of rows with it.
    """

    place: str
    rows: int = 0
    read: set[str] = field(default_factory=set)
    unread: dict[str, Unread] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def add(self, row: TrackedRow, unread: Mapping[str, Any]) -> None:
        """Count a row, and its columns and keys that were not read."""
        self.rows += 1
        self.read.update(name for name in row.read if name in row and has_value(row.peek(name)))
        for change in row.changed:
            self.changed[change] = self.changed.get(change, 0) + 1
        for name, value in unread.items():
            self.set_aside(name, value, row.why.get(name, ""))

    def set_aside(self, name: str, value: Any, why: str) -> None:
        """Count a value that is not read, and why."""
        self.unread.setdefault(name, Unread(kind_of(value), why)).add(value)

    def suspects(self) -> list[str]:
        """Columns and keys that nobody named and whose text differs from row to row: perhaps part of the pairs."""
        return [
            name
            for name, unread in self.unread.items()
            if unread.varies and not unread.why and name.lower() not in _ABOUT
        ]

    def describe(self, name: str) -> str:
        """One column or key that was not read, in words."""
        unread = self.unread[name]
        told = f"{shorten(name)}: {unread.kind} in {unread.count} of {self.rows} rows"
        return told + (f", {unread.why}" if unread.why else "")

    def lines(self) -> Iterator[str]:
        """The balance in words, on as many lines as the names need."""
        read = f"{self.place}: {self.rows} rows; read: {listed(sorted(map(shorten, self.read)))}"
        changed = listed([f"{what} in {count}" for what, count in self.changed.items()])
        unread = [self.describe(name) for name in self.unread]
        for start in range(0, max(1, len(unread)), _A_LINE):
            names = "; ".join(unread[start : start + _A_LINE])
            told = (f"; NOT read: {names}" if names else "") + (f"; {changed}" if changed else "")
            yield (f"{self.place}" if start else read) + told
            changed = ""

    def tell(self) -> None:
        """Print on stderr what was not read, or was changed; from one process."""
        if self.unread or self.changed:
            for line in self.lines():
                tell(line)

    def to_json(self) -> dict[str, Any]:
        """As in data_report.json."""
        return {
            "place": self.place,
            "rows": self.rows,
            "read": sorted(self.read),
            "unread": {
                name: {"count": each.count, "kind": each.kind, "why": each.why} for name, each in self.unread.items()
            },
            "changed": self.changed,
        }
