"""Memory and throughput of this rank's device, and whether the ranks are even."""

import dataclasses
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from tandem.runs import write_json

GIB = 2**30
UNEVEN = 1.25  # the ranks count as unbalanced where the greatest of a quantity is this many times its mean

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes; None where the device does not tell."""

    allocated: int
    """In use by tensors; on a CPU, resident memory of the process."""
    reserved: int | None
    """Held by the allocator, in use or not."""
    peak: int | None
    """Greatest `allocated` so far."""

    def values(self) -> dict[str, float]:
        """Flat, in GiB."""
        return {f"{name}_gib": size / GIB for name, size in dataclasses.asdict(self).items() if size is not None}


@dataclasses.dataclass(frozen=True)
class Usage:
    """One rank's share of the work since the log before."""

    memory: Memory
    pairs_per_second: float
    tokens_per_second: float

    def values(self) -> dict[str, float]:
        """Flat, memory in GiB."""
        return self.memory.values() | {
            "pairs_per_second": self.pairs_per_second,
            "tokens_per_second": self.tokens_per_second,
        }


def device_name(device: torch.device) -> str:
    """A name such as `NVIDIA H100 80GB HBM3`, `GAUDI2` or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "hpu":
        return str(_hpu().get_device_name())
    return platform.processor() or platform.machine()


def read_memory(device: torch.device) -> Memory:
    """Memory of `device` now. Reads counters only: no device sync."""
    if device.type == "cuda":
        return Memory(
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
            torch.cuda.max_memory_allocated(device),
        )
    if device.type == "hpu":
        stats = _hpu().memory_stats()
        return Memory(stats["InUse"], None, stats["MaxInUse"])
    if device.type == "mps":
        return Memory(torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory(), None)
    resident = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(resident, None, max(peak, resident))


def _hpu() -> Any:
    return torch.hpu  # type: ignore[attr-defined]  # put there by Intel's plugin


class Throughput:
    """Pairs and tokens per second of training: data loading is counted, evaluation and saving are not."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._mark = clock()
        self._seconds = 0.0
        self._pairs = 0
        self._tokens = 0

    def resume(self) -> None:
        """Leave out the time since the last step's end, which was not training."""
        self._mark = self._clock()

    def step(self, pairs: int, tokens: int) -> None:
        """An optimizer step of `pairs` pairs and `tokens` tokens on this rank has ended."""
        now = self._clock()
        self._seconds += now - self._mark
        self._mark = now
        self._pairs += pairs
        self._tokens += tokens

    def take(self) -> tuple[float, float]:
        """Pairs and tokens per second since the last `take`."""
        seconds = max(self._seconds, 1e-9)
        rates = self._pairs / seconds, self._tokens / seconds
        self._seconds, self._pairs, self._tokens = 0.0, 0, 0
        return rates


def write_devices(path: Path, accelerator: Accelerator) -> None:
    """Write the name of each rank's device as JSON. Collective."""
    names = gather_object([device_name(accelerator.device)])
    if accelerator.is_main_process:
        write_json(path, dict(enumerate(names)))


class RankUsage:
    """Each rank's memory and throughput since the last log."""

    def __init__(self) -> None:
        self.throughput = Throughput()
        self._imbalance: str | None = None

    def gather(self, accelerator: Accelerator, step: int) -> dict[str, float]:
        """`system/rank_k/*` of all ranks, the same on each. Collective. Rank 0 warns once ranks become unbalanced."""
        usages = gather_object([Usage(read_memory(accelerator.device), *self.throughput.take())])
        found = imbalance(usages)
        if accelerator.is_main_process and found is not None and self._imbalance is None:
            logger.warning("The ranks are unbalanced at step %d: %s", step, found)
        self._imbalance = found
        return by_rank([usage.values() for usage in usages])


def by_rank(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """What the trackers get of all ranks: `system/rank_k/*`."""
    return {f"system/rank_{rank}/{name}": value for rank, own in enumerate(values) for name, value in own.items()}


def imbalance(usages: Sequence[Usage]) -> str | None:
    """One line on ranks that need much more memory or get many more tokens than the mean; None if they are even."""
    quantities = {
        "memory in GiB": [(usage.memory.peak or usage.memory.allocated) / GIB for usage in usages],
        "tokens per second": [usage.tokens_per_second for usage in usages],
    }
    uneven = []
    for name, values in quantities.items():
        mean = sum(values) / len(values)
        most = max(range(len(values)), key=values.__getitem__)
        if mean > 0 and values[most] > UNEVEN * mean:
            uneven.append(f"{name}: rank {most} has {values[most]:.3g}, the mean is {mean:.3g}")
    return "; ".join(uneven) or None
