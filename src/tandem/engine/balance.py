"""Which pairs of an optimizer step each process forwards in which micro-batch, so that all have equally much to do.

Without padding, a process with longer pairs takes longer, and the step takes as long as the slowest process. So the
pairs of each step are dealt again: every process and micro-batch still gets as many, so that a mean over pairs weighs
each as before, and the step has the same pairs and therefore the same gradient. transformers'
`train_sampling_strategy="batch_rebalance"` is not used: it counts padded tokens and gives processes unequal counts of
pairs, under which the mean of their means is not the mean over pairs.

The partition is that of the differencing method, Karmarkar and Karp 1982, for parts of equal counts (Michiels et al.
2003, "Performance ratios for the differencing method applied to the balanced number partitioning problem"), then
improved by exchanges. All numbers are integers: every process, on whatever machine, deals alike.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from tandem.widths import Widths

Ints = NDArray[np.int64]
Waits = Literal["step", "micro_batch"]
"""When processes wait for each other: once in an optimizer step (DDP), or in each micro-batch (sharded weights)."""

_SCALE = 1 << 20  # a token's cost, so that the others can be integers beside it
_GAIN = 0.01  # of the time, for which micro-batches may differ in size, and so in memory
_MAX_EXCHANGES = 2000


@dataclass(frozen=True)
class Cost:
    """Arithmetic of a pair, in 2⁻²⁰ of what a token takes in the layers' matrices."""

    per_token: int = _SCALE
    per_scored: int = 0
    """A token whose log-prob is wanted: it goes through the head as well."""
    per_key: int = 0
    """A query and a key that attention brings together."""

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers config (of the text model). Where that does not say, tokens are counted alone."""
        widths = Widths.of(config)
        if widths is None:
            return cls()
        hidden, head = widths.hidden, widths.head
        # Multiplications: queries and outputs, keys and values, a gated feed-forward of three matrices
        layer = hidden * 2 * (widths.heads + widths.groups) * head + 3 * widths.experts * hidden * widths.inner
        attention = 2 * widths.heads * head
        token = widths.layers * layer
        return cls(
            per_scored=_SCALE * widths.vocabulary * hidden // token, per_key=_SCALE * widths.layers * attention // token
        )

    def total(self, tokens: Ints, scored: Ints, keys: Ints) -> Ints:
        """(n,) of n pairs, from (n,) counts each."""
        return self.per_token * tokens + self.per_scored * scored + self.per_key * keys


@dataclass(frozen=True)
class Dealing:
    """How an optimizer step's pairs are dealt.

    Attributes:
        ranks: N processes that get pairs of their own.
        micro_batches: A of each process in a step.
        size: B pairs of a micro-batch.
        waits: when the processes wait for each other.
        padded: a micro-batch takes as long as B times its longest pair.
    """

    ranks: int
    micro_batches: int
    size: int
    waits: Waits = "step"
    padded: bool = False

    @property
    def in_step(self) -> int:
        """Pairs of an optimizer step."""
        return self.ranks * self.micro_batches * self.size

    def step(self, costs: Sequence[int] | Ints, groups: Sequence[int] | None = None) -> list[int]:
        """The order in which a step's pairs are dealt: by micro-batch, process, row.

        Args:
            costs: of the pairs in the order of the sampler: N·B for each micro-batch that the step has.
            groups: a number for each pair; those with the same stay in one micro-batch. None: all are single. Where
                the groups do not fit into the micro-batches, nothing is moved.

        Raises:
            ValueError: other than full micro-batches.
        """
        rounds, more = divmod(len(costs), self.ranks * self.size)
        if more:
            raise ValueError(f"{len(costs)} pairs are not micro-batches of {self.size} on {self.ranks} processes")
        if self.ranks == 1:
            return list(range(len(costs)))
        work = np.asarray(costs, np.int64)
        made = self._micro_batches(work, _Units.of(work, range(len(work)) if groups is None else groups), rounds)
        if made is None:
            return list(range(len(costs)))
        return [pair for of_round in made for batch in of_round for pair in batch]

    def _micro_batches(self, work: Ints, units: "_Units", rounds: int) -> list[list[list[int]]] | None:
        """Pairs by round, process and row."""
        if self.padded:
            batches = units.sorted_into(rounds * self.ranks, self.size)
            if batches is None:
                return None
            return self._arranged(batches, [self.size * int(work[batch].max()) for batch in batches])
        if self.waits == "micro_batch":
            return self._even_in_rounds(work, units, rounds)
        shares = units.split(self.ranks, rounds * self.size)
        if shares is None:
            return None
        cut = units.cut(shares, rounds, self.size)
        if cut is None:
            return None
        largest_first = [sorted(batches, key=lambda batch: -work[batch].sum()) for batches in cut]
        return [list(of_round) for of_round in zip(*largest_first, strict=True)]

    def _even_in_rounds(self, work: Ints, units: "_Units", rounds: int) -> list[list[list[int]]] | None:
        """Equal micro-batches, or, where that is faster, all processes take the longest pairs in the same round."""
        even = units.split(rounds * self.ranks, self.size)
        if even is None:
            return None
        found = self._arranged(even, [int(work[batch].sum()) for batch in even])
        slices = units.sorted_into(rounds, self.ranks * self.size)
        by_length = units.cut(slices, self.ranks, self.size) if slices else None
        if by_length and _slowest(work, by_length) < (1 - _GAIN) * _slowest(work, found):
            return by_length
        return found

    def _arranged(self, batches: list[list[int]], work: list[int]) -> list[list[list[int]]]:
        """Micro-batches by round and process."""
        order = sorted(range(len(batches)), key=lambda index: -work[index])
        if self.waits == "micro_batch":
            rounds = [order[start : start + self.ranks] for start in range(0, len(order), self.ranks)]
        else:
            costs = np.array(work)
            units = _Units.of(costs, range(len(batches)))
            shares = units.split(self.ranks, len(batches) // self.ranks) or []
            rounds = [
                list(each) for each in zip(*(sorted(share, key=lambda i: -costs[i]) for share in shares), strict=True)
            ]
        return [[batches[index] for index in of_round] for of_round in rounds]

    def time(self, costs: Sequence[int] | Ints) -> int:
        """The cost of a step whose pairs are dealt in this order: the slowest process's, summed over the waits."""
        work = np.asarray(costs, np.int64)
        total, by_rank = 0, np.zeros(self.ranks, np.int64)
        at_a_time = self.ranks * self.size
        for start in range(0, len(work), at_a_time):
            batches = [work[first : first + self.size] for first in range(start, start + at_a_time, self.size)]
            of_round = [
                int(each.max()) * len(each) if self.padded else int(each.sum()) for each in batches if len(each)
            ]
            by_rank[: len(of_round)] += of_round
            total += max(of_round)
        return total if self.waits == "micro_batch" else int(by_rank.max())

    def bound(self, costs: Sequence[int] | Ints) -> float:
        """A lower bound on the cost of a full step without padding, however its pairs are dealt in equal counts."""
        work = np.sort(np.asarray(costs, np.int64))[::-1]
        mean = work.sum() / self.ranks
        if self.waits == "step":
            in_share = self.micro_batches * self.size
            return max(mean, float(work[0] + work[len(work) - in_share + 1 :].sum()))
        if self.size == 1:  # the longest of each round are at least every N-th
            return float(work[:: self.ranks].sum())
        # The longest pair's round takes at least as long as that pair's batch with the shortest, and it takes at most
        # the N·B longest pairs out of the other rounds
        longest = work[0] + work[len(work) - self.size + 1 :].sum()
        taken = work[: self.ranks * self.size].sum() / self.ranks
        return float(max(mean, longest + mean - taken))


def _slowest(work: Ints, rounds: list[list[list[int]]]) -> int:
    return sum(max(int(work[batch].sum()) for batch in of_round) for of_round in rounds)


@dataclass(frozen=True)
class _Units:
    """The units of dealing: a unit is a pair, or a group of pairs. `work` is the cost of all pairs in a unit."""

    pairs: list[list[int]]
    work: list[int]

    @classmethod
    def of(cls, work: Ints, labels: Sequence[int]) -> Self:
        members: dict[int, list[int]] = {}
        for pair, label in enumerate(labels):
            members.setdefault(label, []).append(pair)
        pairs = list(members.values())
        return cls(pairs, [int(work[each].sum()) for each in pairs])

    def among(self, pairs: Sequence[int]) -> Self:
        """The units whose pairs are these."""
        kept = set(pairs)
        units = [index for index, each in enumerate(self.pairs) if each[0] in kept]
        return type(self)([self.pairs[index] for index in units], [self.work[index] for index in units])

    def cut(self, shares: Sequence[Sequence[int]], parts: int, size: int) -> list[list[list[int]]] | None:
        """Each share's pairs in `parts` parts; None where the groups do not fit."""
        found = [self.among(share).split(parts, size) for share in shares]
        return None if None in found else [batches for batches in found if batches is not None]

    def _largest_first(self) -> list[int]:
        return sorted(range(len(self.work)), key=lambda unit: -self.work[unit])

    def sorted_into(self, parts: int, size: int) -> list[list[int]] | None:
        """Parts of `size` pairs from the longest to the shortest; None if a group lies across two."""
        found: list[list[int]] = [[]]
        for unit in self._largest_first():
            if len(found[-1]) == size:
                found.append([])
            found[-1] += self.pairs[unit]
            if len(found[-1]) > size:
                return None
        return found if len(found) == parts else None

    def split(self, parts: int, size: int) -> list[list[int]] | None:
        """`parts` parts of `size` pairs each, the largest of which is nearly as small as it can be; None where the
        groups do not fit."""
        if parts == 1:
            return [[pair for each in self.pairs for pair in each]]
        if size == 1:
            return self.pairs if len(self.pairs) == parts else None
        single = all(len(each) == 1 for each in self.pairs)
        chosen = self._differenced(parts) if single else self._greedy(parts, size)
        if chosen is None:
            return None
        self._exchange(chosen, parts)
        found: list[list[int]] = [[] for _ in range(parts)]
        for unit, part in enumerate(chosen.tolist()):
            found[part] += self.pairs[unit]
        return found

    def _differenced(self, parts: int) -> Ints:
        """(units,) the part of each, by differencing: of the two most uneven partial solutions, the fullest part of one
        is merged with the emptiest of the other, and so on."""
        order = self._largest_first()
        heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
        for number, start in enumerate(range(0, len(order), parts)):
            bins = [(self.work[unit], [unit]) for unit in order[start : start + parts]]
            heapq.heappush(heap, (bins[-1][0] - bins[0][0], number, bins))
        while len(heap) > 1:
            (_, number, first), (_, _, second) = heapq.heappop(heap), heapq.heappop(heap)
            bins = [(a + b, mine + other) for (a, mine), (b, other) in zip(first, reversed(second), strict=True)]
            bins.sort(key=lambda each: (-each[0], each[1]))
            heapq.heappush(heap, (bins[-1][0] - bins[0][0], number, bins))
        chosen = np.empty(len(order), np.int64)
        for part, (_, units) in enumerate(heap[0][2]):
            chosen[units] = part
        return chosen

    def _greedy(self, parts: int, size: int) -> Ints | None:
        """(units,) the part of each: large groups first, each into the emptiest part that has room for it."""
        chosen = np.empty(len(self.work), np.int64)
        loads, room = [0] * parts, [size] * parts
        for unit in sorted(range(len(self.work)), key=lambda unit: (-len(self.pairs[unit]), -self.work[unit])):
            need = len(self.pairs[unit])
            fitting = [part for part in range(parts) if room[part] >= need]
            if not fitting:
                return None
            part = min(fitting, key=lambda part: loads[part])
            chosen[unit] = part
            loads[part] += self.work[unit]
            room[part] -= need
        return chosen

    def _exchange(self, chosen: Ints, parts: int) -> None:
        """Exchange units of the largest part for others of as many pairs, while that makes it smaller. In place."""
        work = np.array(self.work, np.int64)
        sizes = np.array([len(each) for each in self.pairs])
        loads = np.zeros(parts, np.int64)
        np.add.at(loads, chosen, work)
        least = math.ceil(work.sum() / parts)
        for _ in range(_MAX_EXCHANGES):
            part = int(loads.argmax())
            if loads[part] <= least:
                return
            mine, others = (chosen == part).nonzero()[0], (chosen != part).nonzero()[0]
            given = work[mine, None] - work[others]
            worst = np.maximum(loads[part] - given, loads[chosen[others]] + given)
            worst = np.where(sizes[mine, None] == sizes[others], worst, loads[part])
            one, other = np.unravel_index(int(worst.argmin()), worst.shape)
            if worst[one, other] >= loads[part]:
                return
            loads[part] -= given[one, other]
            loads[chosen[others[other]]] += given[one, other]
            chosen[mine[one]], chosen[others[other]] = chosen[others[other]], part


def parts_within(sizes: Sequence[int] | Ints, budget: int, *, padded: bool = False) -> int:
    """The fewest parts of equal counts into which n items can be cut so that no part is larger than `budget`.

    n if a single item is larger.

    Args:
        sizes: (n,) of the items.
        padded: a part is as large as its largest item, times its count.
    """
    largest_of = (lambda part: len(part) * max(part)) if padded else sum
    for parts in range(1, len(sizes)):
        if len(sizes) % parts == 0:
            cut = evenly(sizes, parts, padded=padded)
            if max(largest_of([int(sizes[item]) for item in part]) for part in cut) <= budget:
                return parts
    return len(sizes)


def evenly(sizes: Sequence[int] | Ints, parts: int, *, padded: bool = False) -> list[list[int]]:
    """The items, by index, in `parts` parts of equal counts, the largest of which is nearly as small as it can be."""
    work = np.asarray(sizes, np.int64)
    units = _Units.of(work, range(len(work)))
    size = len(work) // parts
    cut = units.sorted_into(parts, size) if padded else units.split(parts, size)
    if cut is None:
        raise ValueError(f"{len(work)} items do not go into {parts} parts")
    return sorted(sorted(part) for part in cut)
