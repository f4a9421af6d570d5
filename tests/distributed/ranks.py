"""Runs of several real processes on this machine's CPU, over gloo on loopback."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
COMMON: dict[str, Any] = {
    "bf16": "false",
    "use_cpu": "true",
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "max_length": 256,
}


def flags(**options: Any) -> list[str]:
    """Options of a script as its command line."""
    argv = []
    for name, value in (COMMON | options).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    """The command that starts a script of scripts/ in several processes: `torchrun("dpo", *flags(…))`."""
    script, *rest = arguments
    launcher = [sys.executable, "-m", "tandem.launch", "torchrun", "--nproc_per_node", str(processes)]
    return [*launcher, "--master_port", "0", "--rdzv_endpoint", "127.0.0.1:0", "--rdzv_backend", "c10d", script, *rest]


def script(name: str) -> str:
    return str(ROOT / "scripts" / f"{name}.py")


def start(command: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes that train under a launcher, by rank; not what they have started, as wandb's server."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            rank, of_parent = process.environ().get("RANK"), psutil.Process(process.ppid()).environ().get("RANK")
        except psutil.Error:
            continue
        if rank is not None and of_parent is None:
            found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]
