"""All weights of a model of which text reaches a part, on two processes: DDP stops over what gets no gradient."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests import families, tiny, wide
from tests.distributed.launches import run, steps

TOWER = "vision_tower"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("name", ["gemma3", "axk2", "qwen3_5_moe"])
def test_two_processes_train_as_one(name: str, checkpointing: str, tmp_path: Path, script: Callable[[str], ModuleType]):
    """Without --ddp_find_unused_parameters: what was a towers' before is that afterwards."""
    model = tmp_path / "model"
    if name == "gemma3":
        wide.save_model(model, "gemma3", dtype="float32")
    else:
        families.save(name, model)
    data = tiny.save_pairs(tmp_path / "train.jsonl", tiny.hh_rows(8))
    flags = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--bf16", "false", "--logging_steps", "1"]
    flags += ["--gradient_checkpointing", checkpointing, "--max_steps", "2", "--learning_rate", "1e-4"]
    flags += ["--per_device_train_batch_size", "1", "--save_strategy", "no"]

    def command(kind: str, accumulation: int) -> list[str]:
        places = ["--output_dir", str(tmp_path / kind), "--ref_cache", str(tmp_path / f"cache-{kind}")]
        return [*flags, *places, "--gradient_accumulation_steps", str(accumulation)]

    script("dpo").main([*command("one", 4), "--use_cpu", "true"])
    said = run("ddp", 2, ["dpo.py", *command("two", 2)])
    one, two = ([step["loss"] for step in steps(tmp_path / kind)] for kind in ("one", "two"))
    assert len(two) == 2
    if name == "gemma3":  # the others balance their experts over a micro-batch
        assert two == pytest.approx(one, abs=1e-4)
        assert re.search(rf"trained .*not .*{TOWER}, which text does not reach", said)
        before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "two"))
        assert all(torch.equal(after[key], before[key]) for key in before if TOWER in key)
        assert any(not torch.equal(after[key], before[key]) for key in before if TOWER not in key)
