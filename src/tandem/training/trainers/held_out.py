"""Evaluation in training: each held-out row counts once, in whatever batches and on however many processes.

transformers and TRL take the mean of batches' means, in which a row of the last, shorter batch weighs more; and on
several processes the rows that fill the last batches up count twice in some of TRL's metrics.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from tandem.engine.layout import IGNORED_LABEL, PAIR_LAYOUT


class WeightedMeans:
    """Means of values that are added one by one, each with its weight, over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: Any, weight: Any) -> None:
        """`value` is a mean over as many as `weight` says; with 0 it is not looked at. Nothing waits for a device."""
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
    """How many of this process's rows, from the first on, are not there only to fill the last batches up.

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


class MeansOverRows:
    """Mixin over transformers' Trainer: the results of an evaluation are those that its `prediction_step` adds to
    `_means`, among them `loss`."""

    args: Any
    accelerator: Any
    _means: WeightedMeans

    def _is_own(self, per_row: torch.Tensor) -> torch.Tensor:
        """(rows,) float32 beside the rows of a batch of evaluation: 0 for those that another process has too."""
        rows = len(per_row)
        own = own_rows(self.accelerator, self.args.per_device_eval_batch_size, rows)
        return (torch.arange(rows, device=per_row.device) < own).float()

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> Any:
        self._means = WeightedMeans()
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **keywords)  # type: ignore[misc]
        means = self._means.over_ranks(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output


class EachRowOnce(MeansOverRows):
    """Mixin over a TRL trainer on transformers 5: the batches of its evaluation, and what TRL's metrics weigh."""

    _metrics: dict[str, Any]
    _tp_size: int
    _prepare_inputs: Any

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        raise NotImplementedError

    def _first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        """A batch of the first `rows` of `inputs`."""
        raise NotImplementedError

    def _weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """How many each of a batch's metrics is a mean over, by name; and how many all others are."""
        raise NotImplementedError

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        rows = self._rows(inputs)
        own = own_rows(self.accelerator, self.args.per_device_eval_batch_size, rows, self._tp_size)
        if 0 < own < rows:
            inputs = self._first(inputs, own)
        weights, others = self._weights(inputs)
        with self._alone():
            loss, _, _ = super().prediction_step(model, inputs, True)  # type: ignore[misc]
        # A process that has only copies has forwarded them all the same: with shards that is a collective
        counted = int(own > 0)
        metrics = self._metrics["eval"]
        found = {name: metrics.pop(name)[-1] for name in list(metrics) if name != "num_tokens"}
        for name, value in {"loss": loss, **found}.items():
            self._means.add(name, value, weights.get(name, others) * counted)
        return loss, None, None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        accelerator = self.accelerator
        self.accelerator = _Alone(accelerator)
        try:
            yield
        finally:
            self.accelerator = accelerator


class EachPairOnce(EachRowOnce):
    """Of TRL's DPOTrainer."""

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["pair_id"])

    def _first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        pairs = self._rows(inputs)

        def some(value: Any) -> Any:
            if len(value) == pairs:
                return value[:rows]
            return torch.cat([value[:rows], value[pairs : pairs + rows]])

        return {name: some(value) for name, value in inputs.items() if name != PAIR_LAYOUT}

    def _weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        chosen, rejected = (mask.sum() for mask in inputs["completion_mask"][:, 1:].chunk(2))
        weights = {
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
        }
        return weights, self._rows(inputs)


class EachExampleOnce(EachRowOnce):
    """Of TRL's SFTTrainer, whose metrics are all means over tokens."""

    def _rows(self, inputs: Mapping[str, Any]) -> int:
        return len(inputs["input_ids"])

    def _first(self, inputs: dict[str, Any], rows: int) -> dict[str, Any]:
        return {name: value[:rows] for name, value in inputs.items() if name != PAIR_LAYOUT}

    def _weights(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        return {}, (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
