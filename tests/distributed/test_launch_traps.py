"""Launches that accelerate would let pass as something else are refused by name, before anything is written."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tandem.errors import UserError
from tandem.training.trainers.topology import check_launch
from tests.distributed.launches import ROOT, start

ON_CPU = {"use_cpu": True, "bf16": False, "fp16": False, "save_strategy": "steps"}
ON_GPU = ON_CPU | {"use_cpu": False}
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TWO = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
FSDP2 = BY_ACCELERATE | TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def check(environment: dict[str, str], arguments: dict[str, Any], cpu_asked: bool = False, tp_size: int = 1) -> None:
    check_launch(environment, arguments, cpu_asked=cpu_asked, tp_size=tp_size)


def config(tmp_path: Path, **changes: Any) -> str:
    written = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp.yaml").read_text())
    written |= {"num_processes": 2, "main_process_port": 0} | changes
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in written.items() if value is not None}))
    return str(path)


# Traps of accelerate 1.15, each of which ends with exit code 0 when left alone
TRAPS: dict[str, tuple[dict[str, Any], str]] = {
    "MULTI_CPU with 2 processes starts one": (
        {"distributed_type": "MULTI_CPU", "use_cpu": True, "fsdp_config": None},
        "the accelerate config asks for several processes on the CPU, but accelerate has started one",
    ),
    "MULTI_GPU without GPUs starts two jobs that do not know each other": (
        {"distributed_type": "MULTI_GPU", "fsdp_config": None},
        "the accelerate config asks for a GPU per process, but this machine has none",
    ),
    "a config of one GPU trains on the CPU": (
        {"distributed_type": "NO", "num_processes": 1, "main_process_port": None, "fsdp_config": None},
        "accelerate was asked for a GPU, but this machine has none",
    ),
    "FSDP with use_cpu drops FSDP": (
        {"use_cpu": True},
        "the accelerate config asks for FSDP, but accelerate drops it on the CPU",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the traps are those of a machine without GPUs")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_launch_trap_is_refused(tmp_path: Path, tiny_model: Path, tiny_data: Path, trap: str):
    changes, said = TRAPS[trap]
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tandem.launch", "--config_file", config(tmp_path, **changes)]
    command += [str(ROOT / "scripts" / "dpo.py"), "--model_name_or_path", str(tiny_model)]
    command += ["--dataset_name", str(tiny_data), "--output_dir", str(output), "--bf16", "false"]
    done = start(command, {})
    assert done.returncode == 2, done.stderr
    assert f"UserError: {said}" in done.stderr
    assert not output.exists()


def test_what_is_in_order_passes():
    check({}, ON_CPU)
    check(BY_ACCELERATE, ON_CPU)
    check(BY_ACCELERATE | {"ACCELERATE_USE_CPU": "True"}, ON_CPU)
    check(BY_ACCELERATE | {"ACCELERATE_USE_CPU": "False"}, ON_CPU, cpu_asked=True)
    check(BY_ACCELERATE | {"ACCELERATE_USE_CPU": "False"}, ON_GPU)
    check(TWO, ON_CPU)  # torchrun on the CPU
    check(FSDP2, ON_GPU)
    check(BY_ACCELERATE | TWO, ON_GPU)
    check(BY_ACCELERATE | TWO, ON_CPU, cpu_asked=True)
    check(TWO, ON_GPU | {"save_strategy": "no"}, tp_size=2)
    check(TWO | {"WORLD_SIZE": "4"}, ON_GPU | {"save_strategy": "no"}, tp_size=2)


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, ON_GPU, "accelerate to-fsdp2 --config_file"),
        ({k: v for k, v in FSDP2.items() if k != "FSDP_VERSION"}, ON_GPU, "accelerate to-fsdp2 --config_file"),
        (FSDP2, ON_CPU, "drops it on the CPU"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ON_GPU, "--gradient_checkpointing"),
        (FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, ON_GPU, "context"),
        (FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "2"}, ON_GPU, "sequence"),
        (FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, ON_GPU, "--tp_size"),
        (BY_ACCELERATE | TWO | {"ACCELERATE_USE_MEGATRON_LM": "true"}, ON_GPU, "Megatron"),
        (TWO | {"LOCAL_WORLD_SIZE": "3"}, ON_GPU, "3 processes on this machine, but it has 2 devices"),
        (TWO | {"ACCELERATE_MIXED_PRECISION": "bf16"}, ON_GPU, "asks for mixed_precision bf16"),
        (TWO | {"ACCELERATE_MIXED_PRECISION": "fp16"}, ON_GPU | {"bf16": True}, "the run computes in bf16"),
    ],
)
def test_what_would_come_out_otherwise_is_refused(environment: dict[str, str], arguments: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        check(environment, arguments)


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        (FSDP2, ON_GPU | {"save_strategy": "no"}, "cannot be had with an accelerate config of FSDP"),
        (TWO | {"WORLD_SIZE": "3"}, ON_GPU | {"save_strategy": "no"}, "or a multiple of it, not 3"),
        (TWO, ON_GPU, "--save_strategy no"),
    ],
)
def test_tensor_parallelism_that_cannot_be_had(environment: dict[str, str], arguments: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        check(environment, arguments, tp_size=2)
