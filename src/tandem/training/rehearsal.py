"""A training step without the model's weights: on fake tensors to count memory, or on random ones to measure time.

Fake tensors have shapes, dtypes and lifetimes, but no values. Each storage that a step allocates is counted until it is
freed.
"""

import contextlib
import dataclasses
import functools
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from tandem.engine.forward import forward_laid_out
from tandem.engine.layout import IGNORED_LABEL, Layout, PairLayout, lay_out_pairs
from tandem.engine.modes import disable_dropout
from tandem.options.training import TrainOptions
from tandem.training.foreseen import OUTPUTS

Usage = Counter[str]
"""Bytes in use, by part: `weights`, `gradients`, `optimizer`, `activations`."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch: the arguments of the fused forward, and the engine's layout unless it is `padded`."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    plan: PairLayout | None

    @classmethod
    def of(cls, rows: list[tuple[list[int], int]], layout: Layout, groups: list[int] | None = None) -> Self:
        """Rows of token ids, each with the length of its prompt; in pairs, all chosen rows come before the rejected.

        `groups`: see `lay_out_pairs`.
        """
        input_ids, mask, labels = (
            pad_sequence(tensors, batch_first=True, padding_value=padding)
            for tensors, padding in (
                ([torch.tensor(ids) for ids, _ in rows], 0),
                ([torch.ones(len(ids), dtype=torch.int64) for ids, _ in rows], 0),
                ([torch.tensor([IGNORED_LABEL] * prompt + ids[prompt:]) for ids, prompt in rows], IGNORED_LABEL),
            )
        )
        plan = None if layout == "padded" else lay_out_pairs(input_ids, mask, labels, layout, groups)
        return cls(input_ids, mask, labels, plan)

    def log_probs(self, model: Any) -> Tensor:
        """() the sum of the batch's log-probs in nats, by `foreseen.build`'s model."""
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if self.plan is not None:
            output = forward_laid_out(base, self.plan, self.input_ids, self.labels, OUTPUTS)
        else:
            output = base(
                input_ids=self.input_ids, attention_mask=self.attention_mask, labels=self.labels, fused_lm_head=True
            )
        return output.log_probs.sum()


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Steps of one model.

    Attributes:
        model: made by `foreseen.build`. Each rehearsal replaces its tensors.
        train: options of the optimizer.
        autocast: the type that the forward is cast to, or None.
        dropout: whether the model's dropout is on.
        values: whether its tensors hold random numbers, on the CPU: for a model whose control flow depends on values.
    """

    model: Any
    train: TrainOptions
    autocast: torch.dtype | None
    dropout: bool
    values: bool = False

    def count_forward(self, batch: Batch) -> Usage:
        """Bytes at the peak of a forward without gradients."""
        with self._counted(batch) as (step, fake_batch, storages):
            step.forward(fake_batch)
        return storages.at_peak

    def count_step(self, batch: Batch, *, micro_batches: int, has_state: bool) -> Usage:
        """Bytes at the peak of an optimizer step.

        Args:
            micro_batches: how many times `batch` is forwarded.
            has_state: whether the optimizer already has its state, as after the first step.
        """
        with self._counted(batch) as (step, fake_batch, storages):
            if has_state:
                for parameter in step.trained:
                    parameter.grad = torch.zeros_like(parameter)
                step.update()
                storages.mark(step.state(), "optimizer")
                storages.forget_peak()
            for parameter in step.trained:
                parameter.register_post_accumulate_grad_hook(lambda own: storages.mark([own.grad], "gradients"))
            for _ in range(micro_batches):
                step.backward(fake_batch)
            step.update()
        return storages.at_peak

    def time(self, batch: Batch, device: torch.device, repeats: int) -> tuple[float, float]:
        """Seconds of an optimizer step on one micro-batch and of a forward without gradients: the minimum of each."""
        step = self._step(functools.partial(random_like, device=device))
        batch = _mapped(batch, lambda tensor: tensor.to(device))
        return _timed(functools.partial(step.whole, batch), device, repeats), _timed(
            functools.partial(step.forward, batch), device, repeats
        )

    @contextlib.contextmanager
    def _counted(self, batch: Batch) -> Iterator[tuple["_Step", Batch, "Storages"]]:
        """A step on fake tensors, the batch as fake tensors, and the count of live storages."""
        if self.values:
            step = self._step(functools.partial(random_like, device=torch.device("cpu")))
            with (storages := Storages(step.model)):
                yield step, batch, storages
            return
        with FakeTensorMode() as fake:
            step = self._step(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            fake_batch = _mapped(batch, fake.from_tensor)
            with (storages := Storages(step.model)):
                yield step, fake_batch, storages

    def _step(self, make: Callable[[Tensor], Tensor]) -> "_Step":
        replace_tensors(self.model, make)
        if not self.dropout:
            disable_dropout(self.model)
        return _Step(self.model, self.train, self.autocast)


class _Step:
    """A training step, on tensors of any kind."""

    def __init__(self, model: Any, train: TrainOptions, autocast: torch.dtype | None) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.max_grad_norm = train.max_grad_norm
        self.optimizer = optimizer_of(train, model)
        self.autocast = autocast

    def loss(self, batch: Batch) -> Tensor:
        device, dtype = batch.input_ids.device.type, self.autocast
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return batch.log_probs(self.model)

    def backward(self, batch: Batch) -> None:
        self.loss(batch).backward()

    def update(self) -> None:
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[Any]:
        return [value for state in self.optimizer.state.values() for value in state.values()]

    def whole(self, batch: Batch) -> None:
        self.backward(batch)
        self.update()

    @torch.no_grad()
    def forward(self, batch: Batch) -> None:
        self.loss(batch)


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that are not freed yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = Usage()
        self.at_peak = Usage()
        self._of: dict[int, tuple[int, str]] = {}
        self.mark(list(model.parameters()), "weights")

    def mark(self, tensors: list[Any], part: str) -> None:
        """From now on, count these tensors' storages as `part`."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.add(tensor)
                size, before = self._of[key := tensor.untyped_storage()._cdata]
                self._of[key] = size, part
                self.live[before] -= size
                self.live[part] += size

    def forget_peak(self) -> None:
        """Restart the peak from the bytes in use now."""
        self.at_peak = self.live.copy()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._of:
            return
        self._of[storage._cdata] = storage.nbytes(), "activations"
        self.live["activations"] += storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)
        if self.live.total() > self.at_peak.total():
            self.at_peak = self.live.copy()

    def _drop(self, key: int) -> None:
        size, part = self._of.pop(key)
        self.live[part] -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result


def _grouped_product(left: Tensor, right: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The result of torch's grouped product (each expert's matrix times its own tokens), without values.

    torch's own rule for fake tensors takes only bfloat16, although its kernels take float32 too.
    """
    dtype = out_dtype or left.dtype
    if left.dim() == right.dim() == 2:  # the tokens are summed over: a matrix for each expert
        return left.new_empty(len(offs), left.shape[0], right.shape[1], dtype=dtype)
    if right.dim() == 2:
        return left.new_empty(left.shape[1], right.shape[1], dtype=dtype)
    return left.new_empty(*left.shape[:-1], right.shape[-1], dtype=dtype)


def optimizer_of(train: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the model's trained parameters whose state takes as much memory as that of `train.optim`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if train.optim == "sgd":
        return torch.optim.SGD(trained, lr=1e-6)
    if train.optim == "adafactor":
        return Adafactor(trained, lr=1e-6, scale_parameter=False, relative_step=False)
    if "8bit" in train.optim:
        # transformers' trainer keeps moments of embeddings in float32, and bitsandbytes those of fewer than 4096
        embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
        return _EightBitState(trained, {own for own in trained if own in embeddings or own.numel() < 4096})
    return torch.optim.AdamW(trained, lr=1e-6)


class _EightBitState(torch.optim.SGD):
    """SGD with state of the size of bitsandbytes' 8-bit AdamW, whose kernels take no fake tensors.

    Two moments of one byte per number, with a float32 factor for each block of 256 (arXiv 2110.02861, section 2.1).

    Args:
        parameters: the trained parameters.
        exact: those of them whose moments are float32.
    """

    def __init__(self, parameters: list[nn.Parameter], exact: set[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-6)
        self.exact = exact

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = self._moments(parameter)
        return loss

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        size = parameter.numel()
        if parameter in self.exact:
            return {"moments": parameter.new_empty(2 * size, dtype=torch.float32)}
        factors = 2 * math.ceil(size / 256)
        return {
            "moments": parameter.new_empty(2 * size, dtype=torch.uint8),
            "factors": parameter.new_empty(factors, dtype=torch.float32),
        }


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer by `make(tensor)`; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that no other gets its id
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, new)
                table[name] = made[id(tensor)][1]


def random_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Small random numbers of the shape and dtype of `tensor` on `device`; zeros for an integer dtype."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.randn(tensor.shape, dtype=tensor.dtype, device=device) * 0.02


def _mapped(holder: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with `function` applied to every tensor in it."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return _mapped(value, function) if dataclasses.is_dataclass(value) else value

    return dataclasses.replace(
        holder, **{field.name: of(getattr(holder, field.name)) for field in dataclasses.fields(holder)}
    )


def _timed(function: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest call, after a warm-up call."""
    function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
