"""Runs a script of scripts/ in a process that may hold so much memory of its own: `capped.py MIB evaluate.py …`.

A limit of the kernel's counts what a process has mapped (RLIMIT_AS, RLIMIT_DATA), which on a CPU is several times what
it holds. This one is looked at every 10 ms, and counts anonymous memory above that after the imports.
"""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
EXIT_CODE = 137


def anonymous() -> int:
    """MiB of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon:"))


def watch(limit: int) -> None:
    while anonymous() <= limit:
        time.sleep(0.01)
    os._exit(EXIT_CODE)


if __name__ == "__main__":
    import tandem.models.scorer  # noqa: F401

    limit, name, *argv = sys.argv[1:]
    threading.Thread(target=watch, args=(anonymous() + int(limit),), daemon=True).start()
    runpy.run_path(str(SCRIPTS / name))["main"](argv)
