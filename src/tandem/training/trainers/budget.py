"""Micro-batches that stay within so many tokens (`--token_budget`): memory is not sized for the longest pairs.

A batch of the data loader is forwarded and sent back in parts of as many pairs each, in as many on all processes. So
every mean over pairs weighs each as before, also in TRL's metrics (those over tokens are the mean of the parts'), and
sharded weights are gathered as often by each process. What the sampler gives, the steps and what is resumed stay the
same.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from tandem.data.tokenized import SIDES, common_length
from tandem.engine.balance import Ints, evenly, parts_within
from tandem.engine.layout import Layout
from tandem.engine.lengths import PairLengths
from tandem.engine.pairs import PairCollator
from tandem.log import logger
from tandem.training.trainers.deferred import mean_of
from tandem.training.trainers.topology import Topology

_EXAMPLES = "examples"


def forwarded(pair: Mapping[str, Any], max_length: int | None, layout: Layout) -> int:
    """Tokens of one tokenized pair's rows, without padding; with `padded`, twice its longer one."""
    begun, answers = len(pair["prompt_ids"]), (pair["chosen_ids"], pair["rejected_ids"])
    rows = [min(begun + len(answer), max_length or begun + len(answer)) for answer in answers]
    if layout == "padded":
        return 2 * max(rows)
    return sum(rows) - (min(begun + common_length(*answers), *rows) if layout == "shared" else 0)


@dataclass(frozen=True)
class _Kept:
    """Pairs that are not yet tensors, in what accelerate passes on as it is."""

    pairs: Sequence[dict[str, Any]]


class _Keeping(PairCollator):
    """A collator that leaves the pairs as they are."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {_EXAMPLES: _Kept(examples), "pair_id": [pair.get("pair_id") for pair in examples]}


class TokenBudget:
    """Mixin over `PairTrainer`."""

    accelerator: Any
    train_dataset: Any
    data_collator: PairCollator
    current_gradient_accumulation_steps: int
    monitor: Any
    _metrics: dict[str, dict[str, list[Any]]]
    topology: Topology
    _prepare_inputs: Any
    _token_budget: int | None
    """Tokens that a process forwards at a time; None: whatever the loader's batches have."""

    def _budget_row(self) -> dict[str, str]:
        """A row of the start table."""
        if self._token_budget is None:
            return {}
        return {"a batch": f"in parts of as many pairs each, of {self._token_budget} tokens at most"}

    def get_train_dataloader(self) -> DataLoader:
        self._warn_of_long_pairs()
        collate, self.data_collator = self.data_collator, self._reference_collator(0)
        try:
            loader: DataLoader = super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collate
        return loader

    def _warn_of_long_pairs(self) -> None:
        if self._token_budget is None:
            return
        lengths = PairLengths.of(self.train_dataset, self.data_collator.max_length)
        padded = self.data_collator.layout == "padded"
        tokens = (
            2 * np.maximum(lengths.chosen, lengths.rejected) if padded else lengths.tokens(self.data_collator.layout)
        )
        longer = tokens[tokens > self._token_budget]
        if len(longer):
            logger.warning(
                "--token_budget %d: %d of %d pairs are longer by themselves, up to %d tokens: their batches go through "
                "pair by pair", self._token_budget, len(longer), len(tokens), longer.max()
            )  # fmt: skip

    def _reference_collator(self, batch_size: int) -> PairCollator:
        return self.data_collator if self._token_budget is None else _Keeping(**vars(self.data_collator))

    def _parts(self, pairs: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The pairs, by index, as they are forwarded together. Collective."""
        assert self._token_budget is not None
        layout, longest = self.data_collator.layout, self.data_collator.max_length
        sizes: Ints = np.array([forwarded(pair, longest, layout) for pair in pairs])
        padded = layout == "padded"
        count = parts_within(sizes, self._token_budget, padded=padded)
        if self.accelerator.num_processes > 1:
            counts = torch.tensor([count], device=self.accelerator.device)
            count = int(self.accelerator.gather(counts).max())
        return evenly(sizes, count, padded=padded)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PairTrainer`."""
        if _EXAMPLES not in inputs:
            whole: tuple[torch.Tensor, torch.Tensor] = super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
            return whole
        pairs = inputs[_EXAMPLES].pairs
        parts = self._parts(pairs)
        found = []
        for part in parts:
            batch = self._prepare_inputs(self.data_collator([pairs[index] for index in part]))
            batch.pop("pair_id")
            found.append(super().compute_ref_log_probs(model, batch))  # type: ignore[misc]
        place = torch.tensor([index for part in parts for index in part]).argsort()
        chosen, rejected = (torch.cat(side)[place.to(side[0].device)] for side in zip(*found, strict=True))
        return chosen, rejected

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        if _EXAMPLES not in inputs:
            loss: torch.Tensor = super().training_step(model, inputs, *arguments, **keywords)  # type: ignore[misc]
            return loss
        pairs = inputs[_EXAMPLES].pairs
        parts = self._parts(pairs)
        steps, logged = self.current_gradient_accumulation_steps, self._metrics["train"]
        before = {name: len(values) for name, values in logged.items()}
        self.current_gradient_accumulation_steps = steps * len(parts)
        try:
            losses = []
            for number, part in enumerate(parts):
                with self._gradients_stay(model, last=number == len(parts) - 1):
                    batch = self.data_collator([pairs[index] for index in part])
                    losses.append(super().training_step(model, batch, *arguments, **keywords))  # type: ignore[misc]
        finally:
            self.current_gradient_accumulation_steps = steps
        for name, values in logged.items():  # TRL's are means over what was forwarded together: now over the batch
            if len(own := values[before.get(name, 0) :]) == len(parts):
                values[before.get(name, 0) :] = [mean_of(own)]
        self.monitor.join(len(parts), [index for part in parts for index in part], lambda: self.data_collator(pairs))
        return torch.stack(losses).sum()

    def _gradients_stay(self, model: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Where each process has the whole model, gradients are summed over the processes after the last part alone.

        Not where it is sharded: what is not summed there is held whole.
        """
        if last or not self.accelerator.sync_gradients or self.topology.engine != "ddp":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """transformers', of the loader's batch as it would be padded."""
        if _EXAMPLES in inputs:
            pairs, limit = inputs[_EXAMPLES].pairs, self.data_collator.max_length
            rows = [len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]) for pair in pairs for side in SIDES]
            width = min(max(rows), limit or max(rows))
            inputs = {"input_ids": torch.empty(len(rows), width, device="meta")}
        operations: int = super().floating_point_ops(inputs)  # type: ignore[misc]
        return operations
