"""Starts real training runs of one or several processes on this machine's CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN_SCRIPT = Path(__file__).with_name("run_script.py")
_ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
DEEPSPEED = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
# What makes an engine, beside `torchrun`: the kind of `run_script.py`, its environment, its flags
ENGINES: dict[str, tuple[str, dict[str, str], str]] = {
    "ddp": ("plain", {}, ""),
    "fsdp": ("fsdp", FSDP, ""),
    "fsdp_sharded": ("fsdp", FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, ""),
    "fsdp_offload": ("fsdp", FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, ""),
    "zero2": ("plain", DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ""),
    "zero3": ("plain", DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ""),
    "tp": ("fsdp", {}, "--tp_size {processes} --save_strategy no"),
}


def run(engine: str, processes: int, *runs: list[str], environment: dict[str, str] | None = None) -> str:
    """Run scripts one after the other in the same processes; returns what they wrote to stderr.

    Args:
        runs: a script of scripts/ and its command line, each.
    """
    kind, variables, own = ENGINES[engine]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(RUN_SCRIPT), kind]
    for each in runs:
        command += [*each, *own.format(processes=processes).split(), "++"]
    variables = variables | {"LOCAL_SIZE": str(processes)} if engine.startswith("zero") else variables
    done = start(command, variables | (environment or {}))
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr


def start(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "FSDP"))}
    return subprocess.run(
        command, env=inherited | _ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the run logged of each step."""
    history = json.loads((folder / "training_metrics.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]
