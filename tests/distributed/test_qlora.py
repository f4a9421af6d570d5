"""QLoRA on bitsandbytes' kernels for the CPU: on one process, and sharded by FSDP over two.

Skipped where bitsandbytes is not installed; it is an extra (quantization).
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import wide
from tests.distributed.launches import log_history, run, steps

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantization]'")
pytestmark = pytest.mark.slow


def flags(model: Path, data: Path, folder: Path, processes: int) -> list[str]:
    words = f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --ref_cache {folder}-cache
        --bf16 true --use_peft true --load_in_4bit true --dtype bfloat16 --max_steps 4 --logging_steps 1
        --learning_rate 1e-3 --per_device_train_batch_size 1 --gradient_accumulation_steps {4 // processes}
        --save_strategy steps --save_steps 2 --save_total_limit 1 --eval_strategy steps --eval_steps 2 --val_ratio 0.1
    """
    return ["dpo.py", *words.split()]


def test_it_trains_sharded_as_alone(tiny_data: Path, tmp_path: Path):
    model = wide.save_model(tmp_path / "model")
    one, two = tmp_path / "one", tmp_path / "two"
    run("ddp", 1, flags(model, tiny_data, one, 1), kind="gpu")
    said = run("fsdp", 2, flags(model, tiny_data, two, 2))
    assert "layout shared (differs from padded by" in said and "layout padded" not in said
    ours, theirs = steps(two), steps(one)
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=5e-3)
    evaluated = [[entry["eval_loss"] for entry in log_history(folder) if "eval_loss" in entry] for folder in (two, one)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=5e-3)
    for folder in (one, two):
        assert [each.name for each in folder.glob("checkpoint-*")] == ["checkpoint-4"]
        adapter = load_file(folder / "adapter_model.safetensors")
        assert adapter and all("lora" in name for name in adapter)
        assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "lora_B" in name)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert all(torch.isfinite(weight.float()).all() for weight in second.values()) and first.keys() == second.keys()
