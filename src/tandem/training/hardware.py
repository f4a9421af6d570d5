"""The hardware that a plan is for: an accelerate config's, or this process's."""

import dataclasses
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from tandem.devices import has_accelerator
from tandem.errors import UserError
from tandem.monitor.memory import GIB
from tandem.options.training import PlanOptions
from tandem.options.yaml_text import StrictLoader


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Where the run goes.

    Attributes:
        device: `cpu` or the accelerator's type.
        processes: data-parallel processes.
        sharded: which of weights, gradients and optimizer are cut over the processes.
        copies_gradients: whether DDP holds a second copy of the gradients, for communication.
        limit: memory of one device in bytes, None where it is not known.
        is_here: whether this machine is the one.
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
    config: dict[str, Any] = {}
    if options.accelerate_config is not None:
        try:
            config = yaml.load(Path(options.accelerate_config).read_text(encoding="utf-8"), Loader=StrictLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--accelerate_config {options.accelerate_config}: cannot be read: {error}") from error
        if not isinstance(config, dict) or "distributed_type" not in config:
            raise UserError(f"--accelerate_config {options.accelerate_config}: not a config of accelerate")
    kind = str(config.get("distributed_type", "NO"))
    on_cpu = use_cpu or bool(config.get("use_cpu")) or (not config and not has_accelerator())
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 0)
    sharded = {"weights", "gradients", "optimizer"} if kind == "FSDP" or stage == 3 else set()
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
        processes=int(config.get("num_processes") or 1),
        sharded=frozenset(sharded),
        copies_gradients=kind.startswith("MULTI_"),
        limit=limit,
        is_here=is_here,
    )
