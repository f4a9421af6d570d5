"""The dtype that a model computes in, which need not be that of its weights."""

import contextlib
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# From the finest to the coarsest; what is not here (8 bits) counts as bfloat16 where it matters
_FINENESS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Largest mean difference per token that rounding explains, in units of max(1, mean |log p|). Measured on SmolLM2-135M:
# rounding 8e-8, 2e-4 and 1e-3 in the three dtypes; wrong positions, a lost prompt or a lost window 0.03 and more.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def computed_in(model: nn.Module, device_type: str) -> torch.dtype:
    """The coarsest dtype that a forward of `model` would round to if it were called now.

    Weights may be float32 and the products bfloat16: under autocast, under the mixed precision of FSDP, whose
    autocast need not be on, and in layers of 4 bits, which have a dtype of their own to compute in.

    Args:
        device_type: whose autocast counts, as `cuda`.
    """
    found: set[Any] = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            found.add(module._get_fsdp_state()._mp_policy.param_dtype)
        found.add(getattr(module, "compute_dtype", None))  # of bitsandbytes' Linear4bit
    if torch.is_autocast_enabled(device_type):
        found.add(torch.get_autocast_dtype(device_type))
    known = [dtype for dtype in found if isinstance(dtype, torch.dtype)]
    return max(known, key=_coarseness, default=torch.float32)


def _coarseness(dtype: torch.dtype) -> int:
    return _FINENESS.index(dtype) if dtype in _FINENESS else len(_FINENESS)


def tolerance(dtype: torch.dtype) -> float:
    """Largest `probe.difference` that counts as agreement for a model computing in `dtype`."""
    return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])


def same_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast that is on, without its memory of weights: those that it casts without gradients would be trained
    on afterwards."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward of `model` is a collective: its weights lie on several processes (FSDP, ZeRO-3, TP)."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
