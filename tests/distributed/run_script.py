"""Runs scripts of scripts/ in a launched process: `accelerate launch run_script.py gpu dpo.py … ++ sft.py …`.

`gpu` makes accelerate take gloo processes on the CPU for GPU processes, since it shards over nothing else.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


def take_cpu_for_gpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    import tandem.models.load
    import tandem.training.stages

    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend
    training_args.is_torch_bf16_gpu_available = lambda: True
    tandem.training.stages.has_accelerator = lambda: True
    torch.accelerator.device_count = lambda: 64
    torch.Tensor.pin_memory = lambda self: self  # of offloaded weights, for a device to come
    tandem.models.load.has_cuda = lambda: True
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.nn import modules

        modules.has_avx512bf16 = lambda: False  # with it, a forward without gradients leaves weights that have none


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "gpu":
        take_cpu_for_gpu()
    # A run ends its process group, and the store that started it serves no second one
    torch.distributed.destroy_process_group = lambda *_: None
    while rest:
        end = rest.index("++") if "++" in rest else len(rest)
        script, *argv = rest[:end]
        runpy.run_path(str(SCRIPTS / script))["main"](argv)
        rest = rest[end + 1 :]
