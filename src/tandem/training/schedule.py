"""The steps of a run: which pairs are in their batches, and how many tokens."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from tandem.data.tokenized import SIDES, common_length
from tandem.engine.balance import Dealing, Ints, Waits, evenly, parts_within
from tandem.engine.layout import Layout
from tandem.engine.lengths import row_lengths
from tandem.engine.pairs import unpacked
from tandem.training.dealing import Order, row_costs, why_undealt
from tandem.training.examples import untrained
from tandem.training.groups import Groups, pairs_of
from tandem.training.hardware import Hardware
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.rehearsal import Batch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of one run.

    Attributes:
        data: the tokenized pairs or examples that it trains on (`preparation.training_rows`).
        config: transformers' of the text model.
        layout: of the batches that the run forwards.
    """

    run: SFTOptionSet | DPOOptionSet
    hardware: Hardware
    data: Dataset | Groups
    config: Any
    layout: Layout

    @functools.cached_property
    def accumulation(self) -> int:
        """Micro-batches of a process in an optimizer step."""
        return self.run.train.accumulation(self.hardware.processes)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        at_a_time = self.run.train.per_device_train_batch_size * self.hardware.processes
        return math.ceil(math.ceil(len(self.data) / at_a_time) / self.accumulation)

    @functools.cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train = self.run.train
        if train.debug:
            return 4
        if train.max_steps != -1:
            return train.max_steps
        return math.ceil(train.num_train_epochs * self.steps_per_epoch)

    @functools.cached_property
    def batches(self) -> list[list[list[int]]]:
        """The pairs that are forwarded together, in each optimizer step, of all processes: `as_dealt`, or parts of it
        that stay within the token budget."""
        budget = self.run.engine.token_budget if isinstance(self.run, DPOOptionSet) else None
        if budget is None:
            return self.as_dealt
        together = self.hardware.processes
        return [
            [part for start in range(0, len(step), together) for part in self._within(step[start:][:together], budget)]
            for step in self.as_dealt
        ]

    def _within(self, batches: list[list[int]], budget: int) -> list[list[int]]:
        """The parts of a batch, for each process; all processes have equally many."""
        padded, sizes = self.layout == "padded", [[self.tokens([pair]) for pair in batch] for batch in batches]
        parts = max(parts_within(each, budget, padded=padded) for each in sizes)
        return [
            [batch[place] for place in part]
            for batch, each in zip(batches, sizes, strict=True)
            for part in evenly(each, parts, padded=padded)
        ]

    @functools.cached_property
    def as_dealt(self) -> list[list[list[int]]]:
        """The pairs of each micro-batch of each optimizer step, of all processes, as the run deals them."""
        return self.dealt(self.undealt is None)

    def dealt(self, evenly: bool) -> list[list[list[int]]]:
        """`as_dealt`, with pairs dealt by their costs, or in the sampler's order."""
        size, epochs = self.run.train.per_device_train_batch_size, math.ceil(self.steps / self.steps_per_epoch)
        order = Order(len(self.data), self.run.train.seed, self.dealing, self.costs if evenly else None)
        return [_cut(pairs, size) for epoch in range(epochs) for pairs in order.epoch(epoch)][: self.steps]

    @property
    def undealt(self) -> str | None:
        """Why the run does not deal its pairs evenly; None if it does."""
        if self.hardware.processes == 1:
            return "one process"
        dpo = self.run.dpo if isinstance(self.run, DPOOptionSet) else None
        return why_undealt(self.run.train, dpo, self.config)

    @property
    def dealing(self) -> Dealing:
        waits: Waits = "micro_batch" if {"weights", "gradients"} & self.hardware.sharded else "step"
        size = self.run.train.per_device_train_batch_size
        return Dealing(self.hardware.processes, self.accumulation, size, waits, padded=self.layout == "padded")

    @functools.cached_property
    def costs(self) -> Ints:
        """(n,) the cost of each pair or row."""
        if isinstance(self.run, SFTOptionSet):
            return row_lengths(self.data, self.run.text.max_length)
        return row_costs(self.data, self.run.text.max_length, self.config, self.layout)

    def unevenness(self, batches: list[list[list[int]]]) -> float:
        """The time of steps as a multiple of what it would be if all processes had equally much to do."""
        taken = sum(self.dealing.time(self.costs[list(itertools.chain(*step))]) for step in batches)
        whole = sum(self._work(batch) for batch in itertools.chain(*batches))
        return taken * self.hardware.processes / whole

    def _work(self, batch: list[int]) -> int:
        return int(self.costs[batch].max() * len(batch) if self.layout == "padded" else self.costs[batch].sum())

    def unevenness_line(self) -> str:
        """A line on how much longer steps take than if all processes had equally much to do."""
        sampled = self.unevenness(self.dealt(False))
        if self.undealt is not None:
            return f"slowest process, over the mean: {sampled:.2f}; a step's pairs are not dealt evenly: {self.undealt}"
        even = self.unevenness(self.as_dealt)
        return f"slowest process, over the mean: {even:.2f}, in the sampler's order {sampled:.2f}"

    @functools.cached_property
    def lengths(self) -> list[tuple[list[int], int]]:
        """For each pair or row of pairs the lengths of its sequences in tokens, and how much of them others have."""
        longest, found = self.run.text.limit, []
        row: Any
        for row in self.data:
            if isinstance(self.run, SFTOptionSet):
                found.append(([min(len(example["input_ids"]), longest) for example in unpacked([row])], 0))
                continue
            rows: list[int] = []
            shared = 0
            for pair in pairs_of(row):
                prompt, answers = len(pair["prompt_ids"]), [pair[f"{side}_ids"] for side in SIDES]
                both = [min(prompt + len(answer), longest) for answer in answers]
                # The chosen answer of a row's first pair is that of its others
                shared += min(prompt + common_length(*answers), *both) + (both[0] if rows else 0)
                rows += both
            found.append((rows, shared))
        return found

    def tokens(self, batch: Iterable[int]) -> int:
        """Tokens that the backbone forwards for a batch, padding among them."""
        lengths = [self.lengths[index] for index in batch]
        rows = [row for of_pair, _ in lengths for row in of_pair]
        if self.layout == "padded":
            return len(rows) * max(rows)
        return sum(rows) - (sum(shared for _, shared in lengths) if self.layout == "shared" else 0)

    def batch(self, indices: Iterable[int]) -> Batch:
        data: list[Any] = [self.data[index] for index in indices]
        if isinstance(self.run, SFTOptionSet):
            rows = [(example["input_ids"], untrained(example)) for example in unpacked(data)]
            groups = None
        else:
            pairs = [(place, pair) for place, row in enumerate(data) for pair in pairs_of(row)]
            rows = [
                (pair["prompt_ids"] + pair[f"{side}_ids"], len(pair["prompt_ids"]))
                for side in SIDES
                for _, pair in pairs
            ]
            groups = [place for place, _ in pairs]
        return Batch.of([(ids[: self.run.text.max_length], prompt) for ids, prompt in rows], self.layout, groups)

    def largest_reference(self) -> Batch:
        """Of the pass that scores the reference before training: pairs of like length together, the longest first."""
        by_length = sorted(range(len(self.data)), key=lambda index: -self.tokens([index]))
        longest = by_length[: self.run.train.per_device_train_batch_size]
        budget = self.run.engine.token_budget if isinstance(self.run, DPOOptionSet) else None
        return self.largest([longest] if budget is None else self._within([longest], budget))

    def largest(self, batches: Iterable[list[int]]) -> Batch:
        return self.batch(max(batches, key=self.tokens))


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    """Pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
