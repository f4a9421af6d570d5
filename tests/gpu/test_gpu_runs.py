"""A few steps of each training mode on a GPU, resume, merge, evaluation, and the bench's short mode."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import wide

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

ROOT = Path(__file__).parents[2]
# Accelerate config and options of each
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("", ()),
    "lora": ("", ("--use_peft", "true", "--dtype", "bfloat16")),
    "qlora": ("", ("--use_peft", "true", "--load_in_4bit", "true")),
    "8 bits": ("", ("--optim", "adamw_8bit")),
    "fp16": ("", ("--fp16", "true")),
    "deterministic": ("", ("--full_determinism", "true")),
    "fsdp": ("fsdp", ("--gradient_accumulation_steps", "2")),
    "fsdp lora": ("fsdp", ("--gradient_accumulation_steps", "2", "--use_peft", "true", "--dtype", "bfloat16")),
    "fsdp offload": ("fsdp_offload", ()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide.save_model(tmp_path_factory.mktemp("wide"))


def start(*command: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=230)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def dpo(model: Path, data: Path, output: Path, *flags: str, config: str = "") -> list[dict[str, float]]:
    launcher = ["-m", "tandem.launch", "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    launcher += ["--num_processes", "1", "--num_machines", "1"]
    text = start(
        sys.executable, *(launcher if config else ()), ROOT / "scripts" / "dpo.py", "--model_name_or_path", model,
        "--dataset_name", data, "--output_dir", output, "--logging_steps", 1, "--max_steps", 4, "--save_steps", 2,
        "--per_device_train_batch_size", 2, "--ref_cache", output.parent / "cache", *flags,
    )  # fmt: skip
    assert "layout padded" not in text
    log = json.loads((output / "training_metrics.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains(model: Path, tiny_data: Path, tmp_path: Path, mode: str):
    config, flags = MODES[mode]
    log = dpo(model, tiny_data, tmp_path / "out", *flags, config=config)
    assert len(log) == 4 and log[0]["loss"] == pytest.approx(0.6931, abs=5e-3)


def test_a_run_goes_on_and_is_evaluated(model: Path, tiny_data: Path, tmp_path: Path):
    flags = ("--use_peft", "true", "--dtype", "bfloat16", "--full_determinism", "true")
    whole = dpo(model, tiny_data, tmp_path / "out", *flags)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "manifest.json").unlink()
    again = dpo(model, tiny_data, tmp_path / "out", *flags)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]

    start(
        sys.executable,
        ROOT / "scripts" / "merge_lora.py",
        "--adapter",
        tmp_path / "out",
        "--output_dir",
        tmp_path / "m",
    )
    start(
        sys.executable, ROOT / "scripts" / "evaluate.py", "--reference_model", model, "--dpo_model", tmp_path / "m",
        "--dataset_name", tiny_data, "--kl_prompts", 4, "--output_file", tmp_path / "results.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["dtype"] == "bfloat16"


def test_the_benchs_short_mode_of_one_setting(model: Path):
    text = start(
        sys.executable, ROOT / "bench" / "run.py", "--device", "cuda", "--settings", "1B_short", "--repeats", 1,
        "--model", model,
    )  # fmt: skip
    print(text)
    assert "| 1B_short" in text
