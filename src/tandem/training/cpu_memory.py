"""How a process that trains on the CPU gets memory from glibc's heap and the kernel."""

import ctypes
from typing import Any

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# linux/prctl.h
_PR_SET_THP_DISABLE = 41


def prepare_for_training() -> None:
    """Set glibc's heap and the kernel's pages to what training on the CPU needs."""
    keep_freed_memory()
    refuse_huge_pages()


def keep_freed_memory() -> None:
    """Have glibc's malloc keep freed memory for the life of the process; does nothing with another C library.

    By default it returns each large tensor to the kernel, which then zeroes the pages of the next one when they are
    first touched. A training step frees and takes gigabytes: bench/RESULTS.md has the cost.
    """
    _call("mallopt", _M_MMAP_MAX, 0)
    _call("mallopt", _M_TRIM_THRESHOLD, -1)


def refuse_huge_pages() -> None:
    """Have Linux give this process and its children no huge pages; does nothing on another system.

    torch asks for huge pages where it aligns large tensors (`THP_MEM_ALLOC_ENABLE`, see `tandem`). With a heap that
    keeps its memory they cost more system time than the page faults they save: bench/RESULTS.md.
    """
    _call("prctl", _PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library, if it has one of that name."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
