"""The order of a run's pairs: the sampler's, with the pairs of each step dealt evenly over the processes."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from tandem.devices import has_hpu
from tandem.engine.balance import Cost, Dealing, Ints
from tandem.engine.layout import Layout
from tandem.engine.lengths import PairLengths
from tandem.errors import UserError
from tandem.options.losses import DPOOptions
from tandem.options.training import TrainOptions
from tandem.training.groups import Groups
from tandem.training.option_sets import DPOOptionSet

_REMEMBERED = 1024  # by how many steps data loaders may be ahead of the training


def pair_costs(lengths: PairLengths, config: Any, layout: Layout) -> Ints:
    """(n,) what each pair costs: its longer row where rows are padded, else the arithmetic of its own tokens.

    Args:
        config: transformers' of the text model.
    """
    if layout == "padded":
        return np.maximum(lengths.chosen, lengths.rejected)
    return Cost.of(config).total(lengths.tokens(layout), lengths.scored, lengths.keys(layout))


def row_costs(data: Dataset | Groups, max_length: int | None, config: Any, layout: Layout) -> Ints:
    """(n,) what each row costs: a pair, or all pairs of a prompt with several rejected answers."""
    if not isinstance(data, Groups):
        return pair_costs(PairLengths.of(data, max_length), config, layout)
    lengths = PairLengths.of(data.pairs, max_length)
    costs = pair_costs(lengths, config, layout)
    if layout == "shared":  # the chosen answer is forwarded for the first alone
        chosen = dataclasses.replace(lengths, rejected=lengths.prompt, shared=lengths.prompt)
        costs = costs - np.where(data.is_first, 0, pair_costs(chosen, config, layout))
    return data.sums(costs)


def why_undealt(train: TrainOptions, dpo: DPOOptions | None, config: Any) -> str | None:
    """Why the pairs of a step stay in the sampler's order; None if they are dealt.

    Args:
        dpo: None for SFT, whose loss is a mean over the tokens of the whole step.
        config: transformers' of the text model.
    """
    if train.balance_ranks is not None:
        return None if train.balance_ranks else "--balance_ranks false"
    coupled = why_coupled(train, dpo, config)
    return f"{coupled}; --balance_ranks true to do it" if coupled else None


def why_coupled(train: TrainOptions, dpo: DPOOptions | None, config: Any) -> str | None:
    """Why the loss may depend on which pairs share a micro-batch; None where it is a mean over pairs."""
    coupled = [loss.name for loss, _ in (dpo.losses if dpo else []) if loss.coupled]
    if coupled:
        return f"{' and '.join(coupled)} may depend on which pairs share a micro-batch"
    weight = train.router_aux_loss_coef
    weight = getattr(config, "router_aux_loss_coef", 0.0) if weight is None else weight
    if hasattr(config, "output_router_logits") and weight:
        return "experts are balanced over a micro-batch (router_aux_loss_coef)"
    return None


def check_budget(run: DPOOptionSet, config: Any) -> None:
    """Refuse a token budget where the losses of parts would not add up to that of the whole batch.

    Args:
        config: transformers' of the text model.

    Raises:
        UserError: the loss couples pairs, DeepSpeed counts micro-batches by itself, or Gaudi wants one shape.
    """
    if run.engine.token_budget is None:
        return
    why = why_coupled(run.train, run.dpo, config)
    if has_hpu():
        why = "it is not there on Gaudi, where all batches have one shape"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1", "yes"):
        why = "DeepSpeed counts micro-batches by itself; use an accelerate config of FSDP or DDP"
    if why:
        raise UserError(f"--token_budget: {why}")


class Order:
    """The order of a run's pairs, epoch by epoch.

    Args:
        pairs: n, how many there are.
        seed: of the first epoch; each further epoch has the next number.
        dealing: how a step is dealt.
        costs: (n,) of the pairs; None: nothing is dealt, and the order is that of accelerate's SeedableRandomSampler.
    """

    def __init__(self, pairs: int, seed: int, dealing: Dealing, costs: Ints | None) -> None:
        self.pairs, self._seed, self._dealing, self._costs = pairs, seed, dealing, costs
        self._dealt: dict[tuple[int, int], list[int]] = {}

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.pairs // self._dealing.in_step)

    @property
    def rows(self) -> int:
        """Pairs dealt in an epoch. Where they do not fill the last round of all processes, the epoch's first pairs fill
        it, as in accelerate."""
        at_a_time = self._dealing.ranks * self._dealing.size
        return -(-self.pairs // at_a_time) * at_a_time if self._dealing.ranks > 1 else self.pairs

    def epoch(self, epoch: int, undealt_before: int = 0) -> Iterator[list[int]]:
        """The pairs of each step, by micro-batch, process and row.

        Args:
            undealt_before: steps before this one are not dealt, since a resumed run skips them.
        """
        order = self._sampled(epoch)
        for step in range(self.steps):
            pairs = order[step * self._dealing.in_step :][: self._dealing.in_step]
            yield [pairs[place] for place in self._places(epoch, step, pairs)] if step >= undealt_before else pairs

    def in_order(self, epoch: int, before: int, count: int) -> list[int]:
        """Rows of a step, as they were dealt, in the order of the sampler.

        Args:
            before: rows of the epoch in the steps before.
            count: rows of the step.
        """
        step = before // self._dealing.in_step
        if (places := self._dealt.pop((epoch, step), None)) is None:
            places = self._places(epoch, step, self._sampled(epoch)[before:][: self._dealing.in_step])
        if len(places) != count:
            raise RuntimeError(f"step {step + 1} of epoch {epoch + 1} has {count} pairs, and {len(places)} were dealt")
        return np.argsort(places).tolist()

    def _sampled(self, epoch: int) -> list[int]:
        order = torch.randperm(self.pairs, generator=torch.Generator().manual_seed(self._seed + epoch))
        return order[torch.arange(self.rows) % self.pairs].tolist()

    def _places(self, epoch: int, step: int, pairs: list[int]) -> list[int]:
        places = list(range(len(pairs)))
        # A step filled up with repeated pairs keeps its order: accelerate drops the last rows of its metrics as repeats
        if self._costs is not None and step * self._dealing.in_step + len(pairs) <= self.pairs:
            places = self._dealing.step(self._costs[pairs])
        while len(self._dealt) >= _REMEMBERED:
            del self._dealt[next(iter(self._dealt))]
        self._dealt[epoch, step] = places
        return places


class OrderSampler(Sampler[int]):
    """`Order` for a data loader whose batches accelerate deals out to the processes in turn.

    It asks the trainer for the epoch. On several processes accelerate 1.15 does not tell the sampler the epoch when the
    loader skips what was trained already: a run resumed in its second epoch would go on in the order of the first.

    Args:
        done: gives the optimizer steps that are done, when an epoch begins or is gone on with.
    """

    def __init__(self, order: Order, done: Callable[[], int]) -> None:
        self.order, self._done = order, done

    def __len__(self) -> int:
        return self.order.rows

    def __iter__(self) -> Iterator[int]:
        epoch, done = divmod(self._done(), self.order.steps)
        for pairs in self.order.epoch(epoch, undealt_before=done):
            yield from pairs
