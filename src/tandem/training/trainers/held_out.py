"""Evaluation in training: each held-out row counts once, in whatever batches and on however many processes.

transformers and TRL take the mean of batches' means, in which a row of the last, shorter batch weighs more; and on
several processes the rows that fill the last batches up count twice in some of TRL's metrics.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from tandem.engine.layout import IGNORED_LABEL, PAIR_LAYOUT
from tandem.engine.pairs import ROW


class WeightedMeans:
    """Means of values that are added one by one, each with its weight, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: Any, weight: Any) -> None:
        """`value` is a mean over `weight` rows or tokens; a weight of 0 leaves it out. Nothing waits for a device."""
        value = torch.as_tensor(value).detach()
        wide = _widest(value.device)
        weight = torch.as_tensor(weight, device=value.device).to(wide)
        both = torch.stack([torch.where(weight > 0, value.to(wide) * weight, 0.0), weight])
        self._sums[name] = self._sums[name] + both if name in self._sums else both

    def over_ranks(self, accelerator: Accelerator) -> dict[str, float]:
        """The means. Collective: every process has added the same names. Not a number where nothing was counted."""
        if not self._sums:
            return {}
        names, device = sorted(self._sums), accelerator.device
        own = torch.stack([self._sums[name].to(device, _widest(device)) for name in names])
        totals, weights = accelerator.gather(own[None]).sum(0).unbind(1)
        return dict(zip(names, (totals / weights).tolist(), strict=True))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type in ("mps", "hpu") else torch.float64  # neither has float64


def own_rows(accelerator: Accelerator, batch_size: int, rows: int, tp_size: int = 1) -> int:
    """How many of this process's rows, from the first on, are not copies that fill up the last batches.

    Args:
        batch_size: rows of a full batch on one process.
        rows: those of this batch.
        tp_size: processes that have the same rows, which are neighbours.
    """
    state, ranks = accelerator.gradient_state, accelerator.num_processes // tp_size
    if ranks == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    before = accelerator.process_index // tp_size * batch_size
    return max(0, min(int(state.remainder) - before, rows))


class _Alone:
    """An accelerator that gathers nothing; all else is the accelerator's own."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    gather_for_metrics = gather


class HeldOut:
    """A trainer's evaluation: means over rows of the values that are added for each batch, `loss` among them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._means = WeightedMeans()

    def begin(self) -> None:
        """Forget the evaluation before."""
        self._means = WeightedMeans()

    def add(self, values: Mapping[str, Any], weight: Any) -> None:
        """See `WeightedMeans.add`."""
        for name, value in values.items():
            self._means.add(name, value, weight)

    def results(self, prefix: str) -> dict[str, float]:
        """The means, by their names in a log. Collective."""
        means = self._means.over_ranks(self._trainer.accelerator)
        return {f"{prefix}_{name}": mean for name, mean in means.items()}

    def is_own(self, per_row: torch.Tensor) -> torch.Tensor:
        """(rows,) float32, a weight for each row of a batch: 0 for rows that another process has too, else 1."""
        rows = len(per_row)
        return (torch.arange(rows, device=per_row.device) < self._own(rows)).float()

    def once(self, inputs: dict[str, Any], rows: "Rows", tp_size: int) -> "Counted":
        """A batch without the rows that another process has too, and the weights of the means over it.

        Args:
            tp_size: see `own_rows`.
        """
        count = rows.count(inputs)
        own = self._own(count, tp_size)
        if 0 < own < count:
            inputs = rows.first(inputs, own)
        # A process that has only copies forwards them all the same: with shards that is a collective
        return Counted(inputs, *rows.weights(inputs), counts=own > 0)

    def add_trls(self, loss: torch.Tensor, metrics: dict[str, list[Any]], batch: "Counted") -> None:
        """Add the loss of a batch, and the values that TRL has appended to `metrics` for it, which are removed."""
        found = {name: metrics.pop(name)[-1] for name in list(metrics) if name != "num_tokens"}
        for name, value in {"loss": loss, **found}.items():
            self._means.add(name, value, batch.weights.get(name, batch.others) * int(batch.counts))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, the trainer's accelerator gathers nothing."""
        accelerator = self._trainer.accelerator
        self._trainer.accelerator = _Alone(accelerator)
        try:
            yield
        finally:
            self._trainer.accelerator = accelerator

    def _own(self, rows: int, tp_size: int = 1) -> int:
        return own_rows(self._trainer.accelerator, self._trainer.args.per_device_eval_batch_size, rows, tp_size)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A batch of an evaluation.

    Attributes:
        inputs: what is forwarded.
        weights: by the name of a metric, how many values it is a mean over.
        others: the same for all other metrics.
        counts: False if all of its rows are another process's.
    """

    inputs: dict[str, Any]
    weights: dict[str, Any]
    others: Any
    counts: bool


class Rows(Protocol):
    """How the batches of a TRL trainer are made, and what its metrics are means over."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        """Rows of a batch."""

    def first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        """A batch of the first `rows` of `inputs`."""

    def weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """See `Counted.weights` and `Counted.others`."""


class PairRows:
    """Of TRL's DPOTrainer."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        return inputs[ROW][-1] + 1 if ROW in inputs else len(inputs["pair_id"])

    def first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        pairs = len(inputs["pair_id"])
        count = sum(row < rows for row in inputs.get(ROW, range(pairs)))

        def some(value: Any) -> Any:
            if len(value) == pairs:
                return value[:count]
            return torch.cat([value[:count], value[pairs : pairs + count]])

        return {name: some(value) for name, value in inputs.items() if name != PAIR_LAYOUT}

    def weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        chosen, rejected = (mask.sum() for mask in inputs["completion_mask"][:, 1:].chunk(2))
        weights = {
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "loss": self.count(inputs),  # a row's is the sum of its pairs'
        }
        return weights, len(inputs["pair_id"])


class ExampleRows:
    """Of TRL's SFTTrainer, whose metrics are all means over tokens."""

    def count(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["input_ids"])

    def first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        return {name: value[:rows] for name, value in inputs.items() if name != PAIR_LAYOUT}

    def weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        return {}, (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
