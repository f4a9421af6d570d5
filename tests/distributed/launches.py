"""Starts real training runs of one or several processes on this machine's CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN_SCRIPT = Path(__file__).with_name("run_script.py")
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
}
# By accelerate config, on a CPU: what the process is told (see `run_script.py`), its environment, its flags
ENGINES: dict[str, tuple[str, dict[str, str], str]] = {
    "ddp": ("cpu", {}, "--use_cpu true"),
    "fsdp": ("gpu", {}, ""),
    "fsdp_multi_node": ("gpu", {}, ""),
    "fsdp_offload": ("gpu", {}, ""),
    "deepspeed_zero2": ("cpu", {"DS_ACCELERATOR": "cpu"}, "--use_cpu true"),
    "deepspeed_zero3": ("cpu", {"DS_ACCELERATOR": "cpu"}, "--use_cpu true"),
}


def run(config: str, processes: int, *runs: list[str], kind: str | None = None) -> str:
    """Launch scripts by an accelerate config, one after the other in the same processes; returns their stderr.

    Args:
        runs: a script of scripts/ and its command line, each.
        kind: what the process is told, where it is not the config's own.
    """
    own_kind, variables, own = ENGINES[config]
    command = [*launcher(config, processes), str(RUN_SCRIPT), kind or own_kind]
    for each in runs:
        command += [*each, *(own.split() if kind is None else []), "++"]
    done = start(command, variables | {"LOCAL_SIZE": str(processes)})
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def launcher(config: str, processes: int) -> list[str]:
    """The command that starts a script by `accelerate_configs/`config on this machine alone."""
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    command = [sys.executable, "-m", "tandem.launch", "--config_file", str(path)]
    return [*command, "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]


def start(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "FSDP"))}
    return subprocess.run(
        command, env=inherited | ENVIRONMENT | environment, capture_output=True, text=True, timeout=120
    )


def log_history(folder: Path) -> list[dict[str, Any]]:
    """What the run logged."""
    history: list[dict[str, Any]] = json.loads((folder / "training_metrics.json").read_text())["log_history"]
    return history


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the run logged of each step."""
    return [entry for entry in log_history(folder) if "loss" in entry]
