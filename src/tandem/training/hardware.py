"""The hardware that a plan is made for: that of an accelerate config, or of this process."""

import dataclasses

import psutil
import torch

from tandem.devices import has_accelerator
from tandem.monitor.memory import GIB
from tandem.options.accelerate import AccelerateConfig, read_accelerate_config
from tandem.options.training import PlanOptions


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices that a run will have.

    Attributes:
        device: `cpu` or the accelerator's type.
        processes: data-parallel processes.
        sharded: which of weights, gradients and optimizer are sharded over the processes.
        copies_gradients: whether DDP holds a second copy of the gradients, for communication.
        limit: memory of one device in bytes, None where it is not known.
        is_here: whether it is the hardware of this machine.
    """

    device: str
    processes: int
    sharded: frozenset[str]
    copies_gradients: bool
    limit: int | None
    is_here: bool


def read_hardware(options: PlanOptions, use_cpu: bool) -> Hardware:
    """The hardware of an accelerate config file, or of this process without one.

    Raises:
        UserError: the file cannot be read, or is not an accelerate config.
    """
    named = options.accelerate_config
    config = AccelerateConfig() if named is None else read_accelerate_config(named, "--accelerate_config")
    on_cpu = use_cpu or config.use_cpu or (named is None and not has_accelerator())
    stage = config.zero_stage
    sharded = {"weights", "gradients", "optimizer"} if config.kind == "FSDP" or stage == 3 else set()
    sharded |= {"optimizer"} if stage >= 1 else set()
    sharded |= {"gradients"} if stage >= 2 else set()
    is_here = on_cpu or has_accelerator()
    accelerator = torch.accelerator.current_accelerator() if has_accelerator() else None
    limit = None if options.device_memory_gib is None else int(options.device_memory_gib * GIB)
    if limit is None and on_cpu:
        limit = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    elif limit is None and torch.cuda.is_available():
        limit = torch.cuda.mem_get_info()[1]
    return Hardware(
        device="cpu" if on_cpu else accelerator.type if accelerator else "cuda",
        processes=config.processes,
        sharded=frozenset(sharded),
        copies_gradients=config.kind.startswith("MULTI_"),
        limit=limit,
        is_here=is_here,
    )
