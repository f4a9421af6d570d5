"""The dtype that trained weights are held in: one fine enough for their updates.

bfloat16 has 8 bits of precision: a weight of 0.02 moves in steps of 1.2e-4, and AdamW at a learning rate of 1e-6 would
move it by 1e-6, which is rounded away. So what is trained is held in float32; the forward may still compute in bfloat16
(`--bf16`).
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tandem.errors import UserError
from tandem.models.configuration import stored_dtype
from tandem.options.model import HALF_PRECISION, LoraOptions, ModelOptions, is_adapter


def held_fine(model: ModelOptions, lora: LoraOptions, arguments: Mapping[str, Any]) -> ModelOptions:
    """`model` with a dtype fine enough for what is trained of it.

    An adapter's weights are float32 whatever its base is held in (`upcast_trained`), and FSDP and DeepSpeed keep
    weights of their own in float32 beside a forward in half precision. Else all weights are held in float32.

    Args:
        arguments: of TrainingArguments; `bf16` and `fp16` count.

    Raises:
        UserError: another type was asked for by name.
    """
    if lora.use_peft or is_adapter(model.model_name_or_path) or _has_masters(arguments):
        return model
    if model.dtype in HALF_PRECISION:
        raise UserError(
            f"--dtype {model.dtype} with all weights trains hardly anything: updates smaller than a weight's rounding "
            "are lost. Leave it out (weights in float32, computed in bfloat16 by --bf16), or train an adapter "
            "(--use_peft)"
        )
    if model.dtype != "auto":
        return model
    stored = stored_dtype(model.model_name_or_path, model.model_revision, trust_remote_code=model.trust_remote_code)
    return replace(model, dtype="float32") if stored in HALF_PRECISION else model


def upcast_trained(model: torch.nn.Module) -> None:
    """Hold what is trained of `model` in float32: an adapter of 4 bits, which TRL makes in bfloat16, or a whole module
    beside an adapter on a base in bfloat16. For a forward under autocast, which computes the same."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _has_masters(arguments: Mapping[str, Any]) -> bool:
    sharded = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    on = any(os.environ.get(name, "").lower() in ("true", "1", "yes") for name in sharded)
    return on and bool(arguments["bf16"] or arguments["fp16"])
