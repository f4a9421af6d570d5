"""Tokenized pairs grouped by their row: if prompts have several rejected answers, steps draw rows and not pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from tandem.engine.balance import Ints

GROUP = "group"


class Groups(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """A data set of rows: an item is the list of a row's pairs.

    Args:
        pairs: with a column `group`, a number for each pair.
    """

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs
        labels = np.asarray(pairs[GROUP][:])
        _, first, self._of_pair = np.unique(labels, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)  # rows in the order in which they first appear
        rank[first.argsort()] = np.arange(len(first))
        self._of_pair = rank[self._of_pair]
        order = self._of_pair.argsort(kind="stable")
        self._pairs_of = np.split(order, np.bincount(self._of_pair).cumsum()[:-1])

    def __len__(self) -> int:
        return len(self._pairs_of)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> list[dict[str, Any]]:
        return [self.pairs[int(pair)] for pair in self._pairs_of[row]]

    def __getitems__(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Several items at once, which a data loader asks for."""
        return [self[row] for row in rows]

    def sums(self, of_pairs: Ints) -> Ints:
        """(n,) for each row the sum of its pairs' values."""
        sums = np.zeros(len(self), of_pairs.dtype)
        np.add.at(sums, self._of_pair, of_pairs)
        return sums

    @property
    def is_first(self) -> np.ndarray:
        """Whether each pair is its row's first, whose chosen answer the others share."""
        first = np.zeros(len(self.pairs), np.bool_)
        first[[pairs[0] for pairs in self._pairs_of]] = True
        return first


def by_row(pairs: Dataset) -> Dataset | Groups:
    """The pairs grouped by row; unchanged if each row is a single pair."""
    return Groups(pairs) if GROUP in pairs.column_names else pairs


def pairs_of(item: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of an item of either kind of data set."""
    return item if isinstance(item, list) else [item]
