"""Which pairs a run forwards when: its steps, its batches, and the tokens in them."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset

from tandem.data.tokenized import SIDES, common_length
from tandem.engine.layout import Layout
from tandem.engine.pairs import unpacked
from tandem.training.examples import untrained
from tandem.training.hardware import Hardware
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.rehearsal import Batch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of one run.

    Attributes:
        data: the tokenized pairs or examples that it trains on (`stages.training_data`).
    """

    run: SFTOptionSet | DPOOptionSet
    hardware: Hardware
    data: Dataset

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
        """The pairs of each micro-batch of each optimizer step, of all processes, as the sampler deals them."""
        train = self.run.train
        size, in_a_step = train.per_device_train_batch_size, self.accumulation * self.hardware.processes
        steps: list[list[list[int]]] = []
        for epoch in range(math.ceil(self.steps / self.steps_per_epoch)):
            # As accelerate's SeedableRandomSampler does
            generator = torch.Generator().manual_seed(train.seed + epoch)
            order = torch.randperm(len(self.data), generator=generator)
            steps += _cut(_cut(order.tolist(), size), in_a_step)
        return steps[: self.steps]

    @property
    def layout(self) -> Layout:
        return self.run.engine.layout if isinstance(self.run, DPOOptionSet) else self.run.train.layout

    @functools.cached_property
    def lengths(self) -> list[tuple[list[int], int]]:
        """For each pair the lengths of its rows in tokens, and of the beginning that they share."""
        longest, found = self.run.text.max_length, []
        for row in self.data:
            if isinstance(self.run, SFTOptionSet):
                found.append(([min(len(example["input_ids"]), longest) for example in unpacked([row])], 0))
                continue
            prompt, answers = len(row["prompt_ids"]), [row[f"{side}_ids"] for side in SIDES]
            rows = [min(prompt + len(answer), longest) for answer in answers]
            found.append((rows, min(prompt + common_length(*answers), *rows)))
        return found

    def tokens(self, batch: Iterable[int]) -> int:
        """Tokens that the backbone forwards for a batch, padding among them."""
        lengths = [self.lengths[index] for index in batch]
        rows = [row for of_pair, _ in lengths for row in of_pair]
        if self.layout == "padded":
            return len(rows) * max(rows)
        return sum(rows) - (sum(shared for _, shared in lengths) if self.layout == "shared" else 0)

    def batch(self, indices: Iterable[int]) -> Batch:
        data = [self.data[index] for index in indices]
        if isinstance(self.run, SFTOptionSet):
            rows = [(example["input_ids"], untrained(example)) for example in unpacked(data)]
        else:
            rows = [
                (pair["prompt_ids"] + pair[f"{side}_ids"], len(pair["prompt_ids"])) for side in SIDES for pair in data
            ]
        return Batch.of([(ids[: self.run.text.max_length], prompt) for ids, prompt in rows], self.layout)

    def largest(self, batches: Iterable[list[int]]) -> Batch:
        return self.batch(max(batches, key=self.tokens))


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    """Pieces of `size`, the last of which may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
