"""Defaults of a run on a GPU, and the message when the GPU's memory is full."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tandem.errors import UserError
from tandem.monitor.memory import GIB
from tandem.options.fields import flags_of
from tandem.options.model import is_adapter
from tandem.options.training import TrainOptions
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet

# Processes that collate the next batches while a GPU computes. Two suffice: a batch takes them a few milliseconds
_WORKERS = 2
# Of torch's allocators, and of the libraries below it
_MEMORY_IS_FULL = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cuda failure 2")


def arguments(train: TrainOptions, on_cpu: bool) -> dict[str, Any]:
    """TrainingArguments that depend on whether there is an accelerator."""
    workers = train.dataloader_num_workers
    settings = {
        "dataloader_num_workers": (0 if on_cpu else _WORKERS) if workers is None else workers,
        "dataloader_pin_memory": not on_cpu,
        "accelerator_config": {"non_blocking": not on_cpu},  # from pinned memory a copy need not wait
    }
    if train.optim == "adamw_torch" and not on_cpu and torch.cuda.is_available():
        # The same update in one kernel, without the temporary copies of all that is trained
        settings["optim"] = "adamw_torch_fused"
    return settings


@contextlib.contextmanager
def memory_told(run: SFTOptionSet | DPOOptionSet) -> Iterator[None]:
    """Within the block, an out-of-memory error becomes one line that names the cheapest change.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(each in text for each in _MEMORY_IS_FULL):
            raise
        accumulation = run.train.gradient_accumulation_steps
        change = next(economies(run, accumulation), None)
        advice = f"the cheapest change is {flags_of(change)}" if change else "shard it (FSDP), or take a smaller model"
        raise UserError(f"out of memory{_in_use()}: {advice}; --plan counts a run before it is started") from error


def _in_use() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return f" ({(total - free) / GIB:.1f} of the GPU's {total / GIB:.1f} GiB are in use)"


def economies(run: SFTOptionSet | DPOOptionSet, accumulation: int) -> Iterator[dict[str, Any]]:
    """Changes of options that save memory, by what they cost: first nothing, then time, last what is trained.

    Args:
        accumulation: micro-batches of a process in an optimizer step.
    """
    train = run.train
    if isinstance(run, DPOOptionSet) and run.engine.layout != "shared":
        yield {"layout": "shared"}
    size = train.per_device_train_batch_size
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        smaller = {"per_device_train_batch_size": size}
        # A global batch size already says how many there are in a step
        yield smaller if train.global_batch_size else smaller | {"gradient_accumulation_steps": accumulation}
    if train.gradient_checkpointing is False:
        yield {"gradient_checkpointing": True}
    if not run.lora.use_peft and not is_adapter(run.model.model_name_or_path):
        yield {"use_peft": True}
