"""Lengths of tokenized pairs as the engine forwards them, counted on Arrow's arrays without making Python lists."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tandem.engine.layout import Layout

if TYPE_CHECKING:
    from datasets import Dataset

Ints = NDArray[np.int64]
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_AT_A_TIME = 4096  # pairs whose tokens are compared in one go


@dataclass(frozen=True)
class PairLengths:
    """(n,) int64 each, in tokens.

    Attributes:
        prompt: of the prompt, after truncation.
        chosen, rejected: of a pair's rows, prompt and answer, after truncation.
        shared: of the beginning that both rows have.
    """

    prompt: Ints
    chosen: Ints
    rejected: Ints
    shared: Ints

    @classmethod
    def of(cls, pairs: "Dataset", max_length: int | None) -> "PairLengths":
        """Of tokenized pairs, whose rows are cut at the end to `max_length`."""
        parts = [_lengths(table, max_length) for table in _tables(pairs)]
        return cls(*(np.concatenate([part[i] for part in parts]) for i in range(4)))

    def tokens(self, layout: Layout) -> Ints:
        """(n,) tokens that are forwarded, padding not counted."""
        return self.chosen + self.rejected - (self.shared if layout == "shared" else 0)

    @property
    def scored(self) -> Ints:
        """(n,) tokens whose log-prob is wanted."""
        return self.chosen + self.rejected - 2 * self.prompt

    def keys(self, layout: Layout) -> Ints:
        """(n,) queries times the keys that each attends to."""
        whole = (self.chosen * (self.chosen + 1) + self.rejected * (self.rejected + 1)) // 2
        return whole - (self.shared * (self.shared + 1) // 2 if layout == "shared" else 0)


def row_lengths(examples: "Dataset", max_length: int | None) -> Ints:
    """(n,) tokens of the `input_ids` of n examples, after truncation."""
    lengths = _of(examples.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"])
    return np.minimum(lengths, max_length or np.iinfo(np.int64).max)


def token_arrays(pairs: "Dataset", columns: Sequence[str]) -> Iterator[dict[str, NDArray[np.int32]]]:
    """Each pair's lists of these columns, as arrays that are views of many pairs' tokens."""
    for table in _tables(pairs, columns):
        parts = {}
        for name in columns:
            lists = table[name].combine_chunks()
            parts[name] = np.split(np.asarray(lists.flatten()).astype(np.int32), _of(lists).cumsum()[:-1])
        yield from (dict(zip(columns, row, strict=True)) for row in zip(*parts.values(), strict=True))


def _tables(pairs: "Dataset", columns: Sequence[str] = _IDS) -> Iterator[pa.Table]:
    arrow = pairs.select_columns(list(columns)).with_format("arrow")
    for start in range(0, len(pairs), _AT_A_TIME):
        yield arrow[start : start + _AT_A_TIME]


def _lengths(table: pa.Table, max_length: int | None) -> tuple[Ints, Ints, Ints, Ints]:
    prompt, *answers = (table[name].combine_chunks() for name in _IDS)
    limit = max_length or np.iinfo(np.int64).max
    begun = _of(prompt)
    chosen, rejected = (np.minimum(begun + _of(answer), limit) for answer in answers)
    shared = np.minimum(begun + _common(*answers), np.minimum(chosen, rejected))
    return np.minimum(begun, limit), chosen, rejected, shared


def _of(lists: pa.Array | pa.ChunkedArray) -> Ints:
    return np.asarray(pc.list_value_length(lists), dtype=np.int64)


def _common(left: pa.Array, right: pa.Array) -> Ints:
    """(n,) the number of first tokens that the two lists of each pair have in common."""
    both = np.minimum(_of(left), _of(right))
    some = both > 0
    ends = both[some].cumsum()
    if not len(ends):
        return both
    place = np.arange(ends[-1]) - np.repeat(ends - both[some], both[some])
    tokens = []
    for lists in (left, right):
        starts = _of(lists).cumsum() - _of(lists)
        tokens.append(np.asarray(lists.flatten())[np.repeat(starts[some], both[some]) + place])
    differs = np.where(tokens[0] != tokens[1], place, np.repeat(both[some], both[some]))
    common = np.zeros_like(both)
    common[some] = np.minimum.reduceat(differs, ends - both[some])
    return common
