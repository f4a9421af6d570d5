"""Two processes started by gaudi_multi_card.yaml, on a CPU with gloo for HCCL, beside one with the same batches."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tandem.monitor.margins import read_margins, read_margins_log
from tests.distributed import launches


def train(processes: int, model: Path, data: Path, out: Path, *flags: str) -> str:
    """Four steps of four pairs, over all processes and two micro-batches."""
    size = 2 // processes
    run = f"--model_name_or_path {model} --dataset_name {data} --output_dir {out} --max_length 96 --bf16 false"
    run += f" --per_device_train_batch_size {size} --gradient_accumulation_steps 2 --max_steps 4 --use_cpu true"
    run += f" --learning_rate 0.05 --optim sgd --logging_steps 1 --ref_cache {out}-cache --save_strategy no"
    scripts = [str(Path(__file__).with_name("gloo_for_hccl.py")), str(launches.ROOT / "scripts" / "dpo.py")]
    command = [*launches.launcher("gaudi_multi_card", processes), *scripts, *run.split(), *flags]
    done = launches.start(command, {"PYTHONPATH": f"{launches.ROOT}:{os.environ['PYTHONPATH']}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def margins(out: Path) -> list[dict[str, float]]:
    """Of every pair, by step."""
    records, _ = read_margins_log(out / "logs" / "margins")
    arrays = [read_margins(out / "logs" / "margins" / record["npy"]) for record in records]
    return [dict(zip(map(str, array["pair_id"]), array["margin"].tolist(), strict=True)) for array in arrays]


@pytest.mark.parametrize("use_peft", [False, True])
def test_two_processes_are_one(tiny_model: Path, tiny_data: Path, tmp_path: Path, use_peft: bool):
    one, two = tmp_path / "one", tmp_path / "two"
    for processes, out in ((1, one), (2, two)):
        said = train(processes, tiny_model, tiny_data, out, f"--use_peft={use_peft}")
        assert "Gaudi: layout padded" in said
    assert len(margins(one)) == 4
    assert [list(step) for step in map(sorted, margins(two))] == [list(step) for step in map(sorted, margins(one))]
    for mine, theirs in zip(margins(two), margins(one), strict=True):
        assert len(mine) == 4
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert max(map(abs, margins(one)[-1].values())) > 1e-3  # it has learnt
    for mine, theirs in zip(launches.steps(two), launches.steps(one), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4 if name.startswith("logps") else 1e-5)
    weights = "adapter_model.safetensors" if use_peft else "model.safetensors"
    for name, tensor in load_file(one / weights).items():
        torch.testing.assert_close(load_file(two / weights)[name], tensor, rtol=0, atol=1e-5)
