"""A trainer of several processes deals each optimizer step's pairs so that all have equally much to do."""

from collections.abc import Callable
from typing import Any

import torch

from tandem.engine.balance import Dealing, Ints, Waits
from tandem.training.dealing import Order, OrderSampler

# Engines whose processes gather weights, or sum gradients, in each micro-batch
_WAIT_IN_EACH = ("fsdp", "zero2", "zero3", "tp_fsdp")


class EvenDealing:
    """How a trainer's pairs are dealt, once its `topology` is known.

    Args:
        why_not: from the text model's config, why the pairs of a step stay in the sampler's order; None: they are
            dealt.
        costs: (n,) what each of the training pairs takes.
        padded: whether a micro-batch's rows are padded to its longest.
    """

    def __init__(
        self,
        trainer: Any,
        why_not: Callable[[Any], str | None],
        costs: Callable[[], Ints],
        padded: Callable[[], bool],
    ) -> None:
        self._trainer, self._why_not, self._costs, self._padded = trainer, why_not, costs, padded
        self._order: Order | None = None

    def sampler(self, pairs: int) -> OrderSampler | None:
        """The sampler of `pairs` training pairs; None on one process, where transformers' own will do."""
        topology = self._trainer.topology
        ranks = topology.processes // topology.copies
        if ranks == 1:
            return None
        waits: Waits = "micro_batch" if topology.engine in _WAIT_IN_EACH else "step"
        dealing = Dealing(ranks, topology.accumulation, topology.pairs, waits, padded=self._padded())
        costs = None if self._reason else self._costs()
        self._order = Order(pairs, torch.random.initial_seed(), dealing, costs)
        return OrderSampler(self._order, done=lambda: self._trainer.state.global_step)

    def table_row(self) -> dict[str, str]:
        """A row of the start table, where there are several processes."""
        if self._trainer.topology.processes == self._trainer.topology.copies:
            return {}
        return {
            "a step": f"not dealt: {self._reason}" if self._reason else "dealt so that all processes have as much to do"
        }

    def in_order(self, epoch: int, before: int, count: int) -> list[int]:
        """See `Order.in_order`."""
        return list(range(count)) if self._order is None else self._order.in_order(epoch, before, count)

    @property
    def _reason(self) -> str | None:
        return self._why_not(self._trainer.model.config.get_text_config())
