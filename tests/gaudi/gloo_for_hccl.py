"""Runs a script with gloo where accelerate would take HCCL: `accelerate launch gloo_for_hccl.py SCRIPT …`.

The processes count as those of several HPUs, since optimum-habana puts DDP around the model for no others.
"""

import os
import runpy
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_HPU


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = backend
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
