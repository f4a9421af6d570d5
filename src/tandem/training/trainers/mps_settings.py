"""Options that MPS, Apple's GPUs, cannot serve. As elsewhere, accelerate chooses device and precision."""

from collections.abc import Mapping

import torch

from tandem import ranks
from tandem.errors import UserError
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import TrainOptions

_MACOS_WITH_BF16 = (14, 0)


def check_mps(model: ModelOptions, lora: LoraOptions, train: TrainOptions, environment: Mapping[str, str]) -> None:
    """Refuse what MPS lacks, before anything is loaded.

    Raises:
        UserError: naming all such options together.
    """
    problems = []
    if train.bf16 and not torch.backends.mps.is_macos_or_newer(*_MACOS_WITH_BF16):
        problems.append(f"--bf16 needs macOS {_MACOS_WITH_BF16[0]}")
    if lora.load_in_4bit:
        problems.append("--load_in_4bit needs CUDA")
    if "8bit" in train.optim:
        problems.append(f"--optim {train.optim} needs CUDA")
    if "flash" in (model.attn_implementation or ""):
        problems.append(f"--attn_implementation {model.attn_implementation} needs CUDA: use sdpa")
    processes = ranks.count(environment)
    if train.tp_size > 1 or processes > 1:
        problems.append(f"{max(processes, train.tp_size)} processes: an Apple GPU takes one, without --tp_size")
    if problems:
        raise UserError(f"on MPS: {'; '.join(problems)}; or stay on the CPU with --use_cpu")
