"""Where a process that trains on the CPU keeps its tensors: glibc's heap and the kernel's pages."""

import ctypes
from typing import Any

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# linux/prctl.h
_PR_SET_THP_DISABLE = 41


def prepare_for_training() -> None:
    """What a process that trains on the CPU wants of its heap."""
    keep_freed_memory()
    refuse_huge_pages()


def keep_freed_memory() -> None:
    """Let glibc's malloc keep for itself what is freed, as long as the process lives; nothing elsewhere.

    By default it hands each large tensor back to the kernel, which zeroes the pages of the next one as they are first
    touched. A training step frees and takes gigabytes: bench/RESULTS.md has what that costs.
    """
    _call("mallopt", _M_MMAP_MAX, 0)
    _call("mallopt", _M_TRIM_THRESHOLD, -1)


def refuse_huge_pages() -> None:
    """Let Linux give this process and its children pages of the usual size only; nothing elsewhere.

    torch asks for huge ones where it aligns large tensors (`THP_MEM_ALLOC_ENABLE`, see `tandem`). For a heap that is
    kept they were no gain, and cost more system time than the faults they spare: bench/RESULTS.md.
    """
    _call("prctl", _PR_SET_THP_DISABLE, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library, if it has one of that name."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
