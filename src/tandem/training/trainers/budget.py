"""Micro-batches that stay within so many tokens (`--token_budget`): memory is not sized for the longest pairs.

A batch of the data loader goes through forward and backward in parts. All parts have equally many pairs, and all
processes equally many parts: so every mean over pairs weights each pair as before, also in TRL's metrics (those over
tokens become the mean of the parts'), and all processes gather sharded weights equally often. The sampler's order, the
steps and resuming do not change.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tandem.data.tokenized import SIDES, common_length
from tandem.engine.balance import Ints, evenly, parts_within
from tandem.engine.layout import Layout
from tandem.engine.lengths import PairLengths
from tandem.engine.pairs import PairCollator
from tandem.log import logger
from tandem.training.trainers.deferred import mean_of
from tandem.training.trainers.reference_scorer import Logps

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
    """Pairs that are not tensors yet, in an object that accelerate passes on unchanged."""

    pairs: Sequence[dict[str, Any]]


class _Keeping(PairCollator):
    """A collator that leaves the pairs as they are."""

    def __call__(self, examples: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        pairs = [example for example in examples if not isinstance(example, list)]  # `run_dpo` refuses lists of them
        return {_EXAMPLES: _Kept(pairs), "pair_id": [pair.get("pair_id") for pair in pairs]}


class TokenBudget:
    """The budget of a DPO trainer.

    Args:
        limit: tokens that a process forwards at a time; None: no limit.
    """

    def __init__(self, trainer: Any, limit: int | None) -> None:
        self._trainer, self._limit = trainer, limit

    def table_row(self) -> dict[str, str]:
        """A row of the start table."""
        if self._limit is None:
            return {}
        return {"a batch": f"in parts of as many pairs each, of {self._limit} tokens at most"}

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Within the block, the trainer makes a data loader of pairs that are not tensors yet."""
        self._warn_of_long_pairs()
        trainer = self._trainer
        collate, trainer.data_collator = trainer.data_collator, self.collator()
        try:
            yield
        finally:
            trainer.data_collator = collate

    def collator(self) -> PairCollator:
        """The collator of the batches that `train` and `score` take."""
        collator: PairCollator = self._trainer.data_collator
        return collator if self._limit is None else _Keeping(**vars(collator))

    def score(self, inputs: Mapping[str, Any], scored: Callable[[dict[str, Any]], Logps]) -> Logps:
        """The log-probs of a batch's pairs, by `scored` of each part. Collective."""
        if _EXAMPLES not in inputs:
            return scored(dict(inputs))
        pairs = inputs[_EXAMPLES].pairs
        parts = self._parts(pairs)
        found = []
        for part in parts:
            batch = self._trainer._prepare_inputs(self._trainer.data_collator([pairs[index] for index in part]))
            batch.pop("pair_id")
            found.append(scored(batch))
        place = torch.tensor([index for part in parts for index in part]).argsort()
        chosen, rejected = (torch.cat(side)[place.to(side[0].device)] for side in zip(*found, strict=True))
        return chosen, rejected

    def train(self, model: Any, inputs: dict[str, Any], step: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
        """The loss of a batch, by `step` (forward and backward) of each part. Collective."""
        if _EXAMPLES not in inputs:
            return step(inputs)
        trainer, pairs = self._trainer, inputs[_EXAMPLES].pairs
        parts = self._parts(pairs)
        steps, logged = trainer.current_gradient_accumulation_steps, trainer._metrics["train"]
        before = {name: len(values) for name, values in logged.items()}
        trainer.current_gradient_accumulation_steps = steps * len(parts)
        try:
            losses = []
            for number, part in enumerate(parts):
                with self._gradients_stay(model, last=number == len(parts) - 1):
                    losses.append(step(trainer.data_collator([pairs[index] for index in part])))
        finally:
            trainer.current_gradient_accumulation_steps = steps
        for name, values in logged.items():  # TRL's are means over what was forwarded together: now over the batch
            if len(own := values[before.get(name, 0) :]) == len(parts):
                values[before.get(name, 0) :] = [mean_of(own)]
        order = [index for part in parts for index in part]
        trainer.monitor.join(len(parts), order, lambda: trainer.data_collator(pairs))
        return torch.stack(losses).sum()

    def as_padded(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch for transformers' count of operations: the loader's, with the shape it has when padded."""
        if _EXAMPLES not in inputs:
            return inputs
        pairs, limit = inputs[_EXAMPLES].pairs, self._trainer.data_collator.max_length
        rows = [len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]) for pair in pairs for side in SIDES]
        width = min(max(rows), limit or max(rows))
        return {"input_ids": torch.empty(len(rows), width, device="meta")}

    def _warn_of_long_pairs(self) -> None:
        if self._limit is None:
            return
        collator = self._trainer.data_collator
        lengths = PairLengths.of(self._trainer.train_dataset, collator.max_length)
        padded = collator.layout == "padded"
        tokens = 2 * np.maximum(lengths.chosen, lengths.rejected) if padded else lengths.tokens(collator.layout)
        longer = tokens[tokens > self._limit]
        if len(longer):
            logger.warning(
                "--token_budget %d: %d of %d pairs are longer by themselves, up to %d tokens: their batches go through "
                "pair by pair", self._limit, len(longer), len(tokens), longer.max()
            )  # fmt: skip

    def _parts(self, pairs: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The parts of a batch, as indices of pairs that are forwarded together. Collective."""
        assert self._limit is not None
        collator, accelerator = self._trainer.data_collator, self._trainer.accelerator
        sizes: Ints = np.array([forwarded(pair, collator.max_length, collator.layout) for pair in pairs])
        padded = collator.layout == "padded"
        count = parts_within(sizes, self._limit, padded=padded)
        if accelerator.num_processes > 1:
            counts = torch.tensor([count], device=accelerator.device)
            count = int(accelerator.gather(counts).max())
        return evenly(sizes, count, padded=padded)

    def _gradients_stay(self, model: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """With the whole model on each process, sum gradients over the processes only after the last part.

        Not with a sharded model: there, gradients that are not summed yet take the memory of the whole model.
        """
        accelerator = self._trainer.accelerator
        if last or not accelerator.sync_gradients or self._trainer.topology.engine != "ddp":
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[Any] = accelerator.no_sync(model)
        return context
