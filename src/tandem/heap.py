"""Where a process on CPU keeps the memory of tensors it is done with."""

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc's malloc keep for itself what is freed, as long as the process lives; nothing elsewhere.

    By default it hands each large tensor back to the kernel, which zeroes the pages of the next one as they are first
    touched. A training step frees and takes gigabytes: bench/RESULTS.md has what that costs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
