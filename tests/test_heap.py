import subprocess
import sys

import pytest

TOUCH = """
import resource, sys
import torch
from tandem.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(("how", "fewest", "most"), [("keep", 0, 31), ("return", 32, 2**20)])
def test_freed_memory_is_not_touched_anew(how, fewest, most):
    """A tensor of 64 MiB, made and freed 40 times, is 16,384 pages, or 32 where the kernel takes huge ones: the last
    time all of them are new, or none."""
    done = subprocess.run([sys.executable, "-c", TOUCH, how], capture_output=True, text=True, check=True)
    assert fewest <= int(done.stdout) <= most
