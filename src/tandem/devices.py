"""Which accelerators this process sees, and what they do fast."""

import contextlib
import os
import re
from pathlib import Path

import torch

# For each major CUDA release, the oldest driver of NVIDIA's that runs its programs (CUDA's release notes, table 3)
_OLDEST_DRIVER = {12: 525, 13: 580}
DRIVER = Path("/proc/driver/nvidia/version")


def has_hpu() -> bool:
    """Whether there is an Intel Gaudi."""
    hpu = getattr(torch, "hpu", None)  # Intel's plugin adds it
    return hpu is not None and bool(hpu.is_available())


def has_cuda() -> bool:
    """Whether there is a GPU that torch calls CUDA: NVIDIA's, or AMD's under ROCm."""
    return torch.cuda.is_available()


def fix_segments() -> None:
    """Have processes started from here on take GPU memory in segments of fixed size, where `tandem` set growing ones.

    CUDA's older way to share memory between processes (`cudaIpcGetMemHandle`) works with fixed segments only.
    """
    if os.environ.get("PYTORCH_ALLOC_CONF") == "expandable_segments:True":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"


def has_mps() -> bool:
    """Whether there is an Apple GPU."""
    return torch.backends.mps.is_available()


def fast_bf16() -> bool:
    """Whether this process's device multiplies bfloat16 in hardware, so that autocast to it pays."""
    if has_hpu():
        return True
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if has_mps():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gpu_without_bf16() -> str | None:
    """Name of this process's CUDA GPU if it is older than Ampere (a T4): torch emulates bfloat16 there, slowly."""
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return torch.cuda.get_device_name()


def has_accelerator() -> bool:
    """Whether torch sees a CUDA, MPS, XPU or HPU device."""
    return torch.accelerator.is_available() or has_hpu()


def device_count() -> int:
    """How many accelerators this machine has. Intel's plugin counts Gaudis: torch.accelerator may not know of them."""
    return int(torch.hpu.device_count()) if has_hpu() else torch.accelerator.device_count()  # type: ignore[attr-defined]


def why_no_gpu() -> str:
    """Why torch sees no CUDA device here, and what to do; the causes are looked for one after the other."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one that is (pytorch.org/get-started)"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not hidden.strip():
        return "CUDA_VISIBLE_DEVICES hides all of them: unset it"
    if not DRIVER.exists():
        return "NVIDIA's driver is not loaded: nvidia-smi must list a GPU (in a container, start it with --gpus all)"
    found = re.search(r"\s(\d+)\.[\d.]+\s", DRIVER.read_text())
    oldest = _OLDEST_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    if found and oldest and int(found[1]) < oldest:
        return (
            f"NVIDIA's driver is {found[0].strip()}, and torch {torch.__version__} for CUDA {torch.version.cuda} needs "
            f"{oldest} or newer: update the driver, or install a torch for an older CUDA"
        )
    return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds none, though the driver is loaded"


def memory(device: torch.device) -> int:
    """Bytes of memory that `device` has, in use or not. For the CPU, and GPUs that share its memory, it is what this
    process may use: the machine's memory or a container's limit, whichever is smaller."""
    if device.type in ("cuda", "xpu"):
        return int(torch.accelerator.get_memory_info(device)[1])
    import psutil

    found = [psutil.virtual_memory().total]
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(limit.read_text()))
    return min(found)
