"""`tandem doctor` and `tandem --version`, for bug reports: they show no path, name or key of the user's."""

import os
import platform
import shutil
import subprocess
from importlib import metadata

import tandem
from tandem import contract

_PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "optimum-habana", "bitsandbytes",
    "deepspeed", "vllm", "flash-attn", "openai", "ray", "wandb",
)  # fmt: skip


def versions() -> str:
    """The versions of Tandem, Python and the packages that Tandem uses, one a line."""
    lines = [f"tandem {tandem.__version__}", f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join(lines)


def diagnosis() -> str:
    """A screenful: versions, the machine, its devices, and whether all that Tandem borrows is there (`contract`)."""
    rows = [
        ("machine", f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"),
        ("memory", _memory()),
        ("devices", _devices()),
        ("compiler", "gcc" if shutil.which("gcc") else "none (triton's kernels need gcc, on NVIDIA GPUs)"),
        ("contract", _contract()),
    ]
    return "\n".join([versions().replace("\n", ", "), *(f"{name:<10}{text}" for name, text in rows)])


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(".")
    gib = 1024**3
    return f"{memory.total / gib:.0f} GiB, {memory.available / gib:.0f} free; disk here {disk.free / gib:.0f} GiB free"


def _devices() -> str:
    """The devices that torch sees, and the driver's version where nvidia-smi or hl-smi tells it."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported: {str(error).splitlines()[0]}"
    from tandem.devices import device_count, has_hpu, has_mps

    built = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built without CUDA"
    if has_hpu():
        return f"{device_count()} Gaudi; driver {_said('hl-smi', '-Q', 'driver_version', '-f', 'csv,noheader')}"
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} × {', '.join(sorted(set(names)))}; driver {driver}; {built}"
    if has_mps():
        return "Apple's GPU (MPS)"
    unused = f"; NVIDIA driver {driver}, which this torch does not use" if driver != "unknown" else ""
    return f"CPU only; {built}{unused}"


def _said(*command: str) -> str:
    """The first line that a program prints, or `unknown`."""
    if shutil.which(command[0]) is None:
        return "unknown"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def _contract() -> str:
    problems = contract.problems()
    if problems:
        return "\n          ".join(problems)
    held = contract.installed()
    return f"{len(held.borrowed)} borrowed names are all there, in the versions they were seen in ({held.name})"
