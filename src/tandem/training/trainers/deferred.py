"""TRL's training metrics with their cost moved to the logging steps.

For every micro-batch TRL 1.16 gathers 15 tensors over all ranks and waits 13 times for the device, to append numbers
that are read only when something is logged. `DeferredGather` stands in for the accelerator while TRL computes these
numbers: it keeps the local tensors and hands out promises, and `collect` gathers all of them at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class Promise:
    """A number or array to be computed later, with the few operations that TRL applies to gathered values."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    def value(self) -> Any:
        """The number; only after the gather it comes from."""
        return self._compute()

    def item(self) -> "Promise":
        return Promise(lambda: float(self.value()))

    def sum(self) -> "Promise":
        return Promise(lambda: self.value().sum())

    def mean(self) -> "Promise":
        return Promise(lambda: self.value().mean())

    def __truediv__(self, other: "Promise") -> "Promise":
        # TRL writes `a / b if b > 0 else 0.0`: the condition moves in here, since b is not known yet
        return Promise(lambda: self.value() / other.value() if other.value() > 0 else torch.tensor(0.0))

    def __floordiv__(self, other: int) -> "Promise":
        return Promise(lambda: self.value() // other)

    def __radd__(self, other: int) -> "Promise":
        return Promise(lambda: other + self.value())

    def __gt__(self, other: int) -> bool:
        return True


def mean_of(values: Sequence[Any]) -> Promise:
    """Promise of the mean of numbers, some of them promised."""
    return Promise(
        lambda: sum(float(each.value() if isinstance(each, Promise) else each) for each in values) / len(values)
    )


class DeferredGather:
    """An accelerator whose gathers wait for `collect`; all else is the accelerator's own.

    Args:
        is_even: whether all ranks promise tensors of the same sizes.
    """

    def __init__(self, accelerator: Accelerator, *, is_even: bool = True) -> None:
        self._accelerator, self._is_even = accelerator, is_even
        self._local: list[torch.Tensor] = []
        self._gathered: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: torch.Tensor) -> Promise:
        """Promise of the tensors of all ranks, one after the other."""
        return self._promise(tensor, None)

    def gather_for_metrics(self, tensor: torch.Tensor) -> Promise:
        """The same, without what accelerate drops at the end of an epoch."""
        state = self._accelerator.gradient_state
        drops = state.end_of_dataloader and state.remainder > 0 and self._accelerator.num_processes > 1
        return self._promise(tensor, state.remainder if drops else None)

    def _promise(self, tensor: torch.Tensor, limit: int | None) -> Promise:
        index = len(self._local)
        self._local.append(tensor.detach())
        return Promise(lambda: self._gathered[index][:limit])

    def collect(self) -> None:
        """Gather everything promised since the last time: one collective, one wait for the device.

        Promises made before the last `collect` must have been read by now.
        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        sizes = [tensor.numel() for tensor in self._local]
        flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in self._local])
        self._local = []
        if not self._is_even:
            shares = gather_object([(sizes, flat.cpu())])
            of_ranks = [part.split(rank_sizes) for rank_sizes, part in shares]
            self._gathered = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]
            return
        ranks = self._accelerator.gather(flat).view(-1, flat.numel()).cpu()
        self._gathered = [part.reshape(-1) for part in ranks.split(sizes, dim=1)]


class DeferredMetrics:
    """The metrics and the token count of a TRL trainer, gathered when they are resolved.

    Args:
        is_even: see `DeferredGather`.
    """

    def __init__(self, trainer: Any, *, is_even: bool = True) -> None:
        self._trainer = trainer
        self._gather = DeferredGather(trainer.accelerator, is_even=is_even)
        self._token_counts: list[Promise] = []

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Within the block, TRL's gathers for its metrics return promises."""
        trainer = self._trainer
        accelerator, counted = trainer.accelerator, trainer._total_train_tokens
        trainer.accelerator, trainer._total_train_tokens = self._gather, 0
        try:
            yield
        finally:
            self._token_counts.append(trainer._total_train_tokens)
            trainer.accelerator, trainer._total_train_tokens = accelerator, counted

    def resolve(self) -> None:
        """Turn what TRL's metrics were promised into numbers. Collective."""
        if not self._token_counts:
            return
        self._gather.collect()
        trainer = self._trainer
        metrics = trainer._metrics["train"]
        trainer._total_train_tokens += int(sum(count.value() for count in self._token_counts))
        self._token_counts = []
        for name, values in metrics.items():
            metrics[name] = [float(value.value()) if isinstance(value, Promise) else value for value in values]
        metrics["num_tokens"] = [trainer._total_train_tokens]
