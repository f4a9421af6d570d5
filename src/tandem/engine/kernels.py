"""Which fused attention kernels this process has, and for what."""

import functools
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from tandem.errors import UserError

try:
    from torch.nn.attention import varlen
except ImportError as error:
    raise UserError(
        f"the pair engine needs torch>=2.11, whose variable-length attention has windows; found {torch.__version__}"
    ) from error

# For the flash kernels of torch and of flash-attn alike
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_HEAD_DIM_MULTIPLE = 8
_CAPABILITY = (8, 0)  # Ampere
# GeForce and workstation cards from Ampere on, whose shared memory is too small for the backward of the largest heads
# (torch, sdp_utils.cpp: check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120)
_SMALL_CARDS = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
_LARGE_HEADS, _LARGEST_HEADS = 192, 224


@functools.cache
def flash_attn_varlen() -> Callable[..., torch.Tensor] | None:
    """flash-attn's variable-length function, None where there is none that can be imported.

    Importing it is the only way to know: flash-attn 4 has the same package name and lacks the function, and a build for
    another torch fails when it is loaded. Done once: a look into the import path in every layer of every pass would
    cost a tenth of a millisecond each.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception:  # a broken build may raise anything
        return None
    function: Callable[..., torch.Tensor] = flash_attn_varlen_func
    return function


@functools.cache
def _takes_enable_gqa(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == "enable_gqa" or each.kind == each.VAR_KEYWORD for each in parameters)


def torch_varlen(*arguments: Any, grouped: bool, **options: Any) -> torch.Tensor:
    """torch's `varlen_attn` with grouped heads: torch 2.13's has an argument for them, 2.11's works without."""
    function: Callable[..., Any] = varlen.varlen_attn
    flag = {"enable_gqa": grouped} if _takes_enable_gqa(function) else {}
    output: torch.Tensor = function(*arguments, **options, **flag)
    return output


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability of a device."""
    return torch.cuda.get_device_capability(device)


def without_flash(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], *, dropout: bool = False
) -> str:
    """Why no flash kernel attends in `dtype` with heads of these sizes (query's, value's) there, with a backward; empty
    if one does."""
    query, value = head_dims
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in _DTYPES:
        return f"it attends in {str(dtype).removeprefix('torch.')}"
    if query != value:
        return f"keys of {query} and values of {value} differ in size"
    if query > _MAX_HEAD_DIM or query % _HEAD_DIM_MULTIPLE:
        return f"its heads of {query} are no multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM}"
    if capability(device) < _CAPABILITY:
        major, minor = capability(device)
        return f"the GPU has compute capability {major}.{minor}, and flash attention begins with 8.0 (Ampere)"
    if query > _LARGE_HEADS and (query <= _LARGEST_HEADS or dropout):
        small = any(first <= capability(device) <= last for first, last in _SMALL_CARDS)
        if small:
            return f"flash attention has no backward for heads of {query}{' with dropout' * dropout} on this GPU"
    return ""


def sdpa_groups_heads(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int], masked: bool) -> bool:
    """Whether `scaled_dot_product_attention` takes grouped heads there in memory linear in the tokens.

    On CUDA only flash takes grouped heads, and it takes no mask; the fallback that takes both needs quadratic memory.
    """
    return device.type != "cuda" or (not masked and not without_flash(device, dtype, head_dims))


def description(device: torch.device, dtype: torch.dtype) -> str:
    """What attends there in `dtype`, in words that change whenever the kernel may be another one."""
    if device.type != "cuda":
        return device.type
    major, minor = capability(device)
    package = f"flash-attn {_version('flash_attn')}" if flash_attn_varlen() else f"torch {torch.__version__}"
    return f"{package} on compute capability {major}.{minor} in {dtype}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
