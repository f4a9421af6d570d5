import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap and Linux's pages")

TOUCH = """
import resource, sys
import torch
from tandem.training.cpu_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("how", "fewest", "most"), [("keep", 0, 31), ("return", 32, 2**20)])
def test_freed_memory_is_not_touched_anew(how, fewest, most):
    """A tensor of 64 MiB, made and freed 40 times, is 16,384 pages, or 32 where the kernel takes huge ones: the last
    time all of them are new, or none."""
    done = subprocess.run([sys.executable, "-c", TOUCH, how], capture_output=True, text=True, check=True)
    assert fewest <= int(done.stdout) <= most


ALIGNMENT = "THP_MEM_ALLOC_ENABLE"
ALIGNED = """
import mmap
import tandem
import torch
print(torch.ones(2**26).data_ptr() % mmap.PAGESIZE)
"""


@pytest.mark.parametrize(("environment", "aligned"), [({}, True), ({ALIGNMENT: "0"}, False)])
def test_large_tensors_begin_at_a_page(monkeypatch, environment, aligned):
    """Unless the user's environment says no."""
    monkeypatch.delenv(ALIGNMENT, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", ALIGNED], capture_output=True, text=True, check=True)
    assert (int(done.stdout.split()[-1]) == 0) is aligned


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
REFUSAL = """
import ctypes, pathlib, re
from tandem.training.cpu_memory import _PR_SET_THP_DISABLE, refuse_huge_pages

def enabled():
    return re.search(r"^THP_enabled:\\s+(\\d)$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)[1]

ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (0, 0, 0, 0)))
before = enabled()
refuse_huge_pages()
print(before, enabled())
"""


@pytest.mark.skipif(not HUGE.exists(), reason="a kernel without huge pages")
def test_huge_pages_are_refused():
    """By the kernel's own word. Allowed first: a child inherits the refusal of a process that trained, and pytest's is
    one as soon as a test trains in it."""
    done = subprocess.run([sys.executable, "-c", REFUSAL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
