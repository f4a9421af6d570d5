"""DPO on several processes against one process, on the same global batches: the same losses and the same margins."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.monitor.margins import read_margins, read_margins_log
from tests.distributed.launches import run, steps

STEPS = 4
GLOBAL_BATCH = 8
ACCUMULATION = 2
VARIANTS = {"full": "", "lora": "--use_peft"}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")


def flags(model: Path, data: Path, folder: Path, cache: Path, processes: int, variant: str) -> list[str]:
    pairs = GLOBAL_BATCH // ACCUMULATION // processes
    common = f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --ref_cache {cache} --bf16 false
        --max_steps {STEPS} --logging_steps 1 --learning_rate 1e-3 --save_strategy no
        --per_device_train_batch_size {pairs} --gradient_accumulation_steps {ACCUMULATION}
    """
    return [*common.split(), *variant.split()]


@pytest.fixture(scope="module")
def alone(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One process, each variant."""
    folder = tmp_path_factory.mktemp("alone")
    for name, variant in VARIANTS.items():
        script("dpo").main(flags(tiny_model, tiny_data, folder / name, folder / "cache", 1, variant))
    return {name: folder / name for name in VARIANTS}


def margins_of(folder: Path) -> list[np.ndarray]:
    records, _ = read_margins_log(folder / "logs" / "margins")
    return [read_margins(folder / "logs" / "margins" / record["npy"]) for record in records]


def check_equal(one: Path, several: Path) -> None:
    """Losses, gradient norms and each pair's margin, step by step."""
    ours, theirs = steps(several), steps(one)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01  # it learns: equal losses are not those of a model at rest
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-5)
        assert mine["num_tokens"] == other["num_tokens"]
    for mine, other in zip(margins_of(several), margins_of(one), strict=True):
        assert mine["pair_id"].tolist() == other["pair_id"].tolist()
        assert np.abs(mine["margin"] - other["margin"]).max() < 1e-5 / 0.1  # nats; the loss sees them times beta


def trained(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Weights of the model that the folder holds, loaded as anyone would."""
    AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        return {name: weight for name, weight in model.state_dict().items() if "lora" in name}
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def check_saved(one: Path, several: Path, base: Path) -> None:
    ours, theirs = trained(several, base), trained(one, base)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Adam divides a gradient by its own size, so rounding in one that is almost zero moves a weight visibly
        assert (ours[name] - weight).abs().mean() < 1e-5, name
        assert ours[name].dtype == weight.dtype


@pytest.mark.parametrize(
    ("engine", "processes", "variants"),
    [
        ("ddp", 2, ("lora",)),
        ("fsdp", 2, ("full", "lora")),
        pytest.param("ddp", 2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("fsdp", 4, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("fsdp_sharded", 2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("fsdp_offload", 2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("zero2", 2, ("full", "lora"), marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("zero3", 2, ("full", "lora"), marks=[pytest.mark.slow, needs_deepspeed]),
        ("tp", 2, ("full",)),
    ],
)
def test_several_processes_train_as_one(
    alone: dict[str, Path],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    engine: str,
    processes: int,
    variants: tuple[str, ...],
):
    chosen = {name: VARIANTS[name] for name in variants}
    pairs = processes if engine != "tp" else 1  # the ranks of a tensor-parallel run have the same pairs
    runs = [
        ["dpo.py", *flags(tiny_model, tiny_data, tmp_path / name, tmp_path / "cache" / name, pairs, variant)]
        for name, variant in chosen.items()
    ]
    said = run(engine, processes, *runs)
    assert f"processes     {processes} on 1 node" in said
    assert f"global batch  {GLOBAL_BATCH} pairs" in said
    for name in chosen:
        check_equal(alone[name], tmp_path / name)
        check_saved(alone[name], tmp_path / name, tiny_model)
