"""Memory that a measured process and its children hold."""

import psutil


def held(process: psutil.Process) -> int:
    """Bytes of a process and its children, shared ones counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total
