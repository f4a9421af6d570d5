"""Memory and throughput of ranks."""

import mmap

import numpy as np
import pytest
import torch

from tandem.monitor import memory
from tandem.monitor.memory import Memory, Throughput, Usage, device_name, imbalance, read_memory


def test_resident_memory_follows_an_allocation() -> None:
    before = read_memory(torch.device("cpu"))
    block = np.frombuffer(mmap.mmap(-1, 2**28))  # not from malloc's heap, which may have as much left over
    block.fill(1.0)
    after = read_memory(torch.device("cpu"))
    assert after.allocated - before.allocated == pytest.approx(block.nbytes, rel=0.1)
    assert after.peak is not None
    assert after.peak >= after.allocated
    assert after.reserved is None
    del block
    assert read_memory(torch.device("cpu")).peak == pytest.approx(after.peak, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counters() -> None:
    device = torch.device("cuda", 0)
    before = read_memory(device)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    after = read_memory(device)
    assert after.allocated - before.allocated == block.numel()
    del block
    assert read_memory(device).allocated == before.allocated
    assert after.reserved is not None
    assert after.peak is not None
    assert after.peak >= before.allocated + 2**26
    assert after.reserved >= after.allocated
    assert device_name(device) == torch.cuda.get_device_properties(device).name


def test_hpu_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    # No such device here: this fixes which of the plugin's counters are read
    class Plugin:
        @staticmethod
        def memory_stats() -> dict[str, int]:
            return {"Limit": 96 * 2**30, "InUse": 3, "MaxInUse": 5, "NumAllocs": 1}

        @staticmethod
        def get_device_name() -> str:
            return "GAUDI2"

    monkeypatch.setattr(torch, "hpu", Plugin, raising=False)
    assert read_memory(torch.device("hpu")) == Memory(allocated=3, reserved=None, peak=5)
    assert device_name(torch.device("hpu")) == "GAUDI2"


def test_device_has_a_name() -> None:
    assert device_name(torch.device("cpu"))


def test_throughput_leaves_out_what_is_no_training() -> None:
    now = 100.0
    throughput = Throughput(clock=lambda: now)
    now = 102.0
    throughput.step(pairs=8, tokens=100)
    now = 150.0  # evaluation
    throughput.resume()
    now = 152.0
    throughput.step(pairs=8, tokens=300)
    assert throughput.take() == (4.0, 100.0)
    now = 153.0
    throughput.step(pairs=8, tokens=100)
    assert throughput.take() == (8.0, 100.0)


def usage(gib: float, tokens: float, peak: bool = True) -> Usage:
    size = int(gib * memory.GIB)
    return Usage(Memory(size, None, size if peak else None), 1.0, tokens)


def test_values_are_flat_and_in_gib() -> None:
    assert Usage(Memory(2**30, None, 2**31), 4.0, 100.0).values() == {
        "allocated_gib": 1.0,
        "peak_gib": 2.0,
        "pairs_per_second": 4.0,
        "tokens_per_second": 100.0,
    }


def test_imbalance_names_the_rank() -> None:
    assert imbalance([usage(10, 100)]) is None
    assert imbalance([usage(10, 100), usage(12, 120)]) is None
    # the mean of 10, 10, 20 and 10 is 12.5, and 20 is 1.6 times that
    assert imbalance([usage(10, 1), usage(10, 1), usage(20, 1), usage(10, 1)]) == (
        "memory in GiB: rank 2 has 20, the mean is 12.5"
    )
    assert imbalance([usage(1, 100), usage(1, 300)]) == "tokens per second: rank 1 has 300, the mean is 200"
    assert imbalance([usage(1, 1, peak=False), usage(9, 1, peak=False)]) is not None
    assert imbalance([usage(1, 0), usage(1, 0)]) is None
