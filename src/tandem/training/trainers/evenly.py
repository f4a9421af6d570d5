"""A trainer of several processes deals each optimizer step's pairs so that all have equally much to do."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Sampler

from tandem.engine.balance import Dealing, Ints, Waits
from tandem.training.dealing import Order, OrderSampler
from tandem.training.trainers.topology import Topology

# Engines whose processes gather weights, or sum gradients, in each micro-batch
_WAIT_IN_EACH = ("fsdp", "zero2", "zero3", "tp_fsdp")


class Evenly:
    """Mixin over transformers' Trainer."""

    args: Any
    state: Any
    model: Any
    topology: Topology
    _undealt: Callable[[Any], str | None]
    """From the text model's config, why the pairs of a step stay in the sampler's order; None: they are dealt."""
    _order: Order | None = None

    def _costs(self) -> Ints:
        """(n,) what each of the training pairs takes."""
        raise NotImplementedError

    @property
    def _reason(self) -> str | None:
        return self._undealt(self.model.config.get_text_config())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        topology = self.topology
        ranks = topology.processes // topology.copies
        if ranks == 1:
            sampler: Sampler | None = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
            return sampler
        waits: Waits = "micro_batch" if topology.engine in _WAIT_IN_EACH else "step"
        dealing = Dealing(ranks, topology.accumulation, topology.pairs, waits, padded=self._is_padded())
        costs = None if self._reason else self._costs()
        pairs = len(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]
        self._order = Order(pairs, torch.random.initial_seed(), dealing, costs)
        return OrderSampler(self._order, done=lambda: self.state.global_step)

    def _dealt_row(self) -> dict[str, str]:
        """A row of the start table, where there are several processes."""
        if self.topology.processes == self.topology.copies:
            return {}
        return {
            "a step": f"not dealt: {self._reason}" if self._reason else "dealt so that all processes have as much to do"
        }

    def _is_padded(self) -> bool:
        """Whether a micro-batch's rows are padded to its longest."""
        return True

    def _in_order(self, epoch: int, before: int, count: int) -> list[int]:
        """See `Order.in_order`."""
        return list(range(count)) if self._order is None else self._order.in_order(epoch, before, count)
