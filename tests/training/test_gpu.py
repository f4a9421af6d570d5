"""Defaults of a run on a GPU, and the line that takes the place of an out-of-memory traceback."""

import os
import runpy
from typing import Any

import pytest
import torch

import tandem
from tandem.data.options import DataOptions
from tandem.devices import fix_segments
from tandem.errors import UserError
from tandem.monitor.options import MonitorOptions
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import EngineOptions, GaudiOptions, TrainOptions, check_training
from tandem.training import gpu
from tandem.training.option_sets import DPOOptionSet
from tandem.training.trainers.topology import check_launch
from tests.distributed.test_launch_traps import FSDP2, ON_GPU, TWO


def run(layout: str = "shared", use_peft: bool = False, **train: Any) -> DPOOptionSet:
    return DPOOptionSet(
        ModelOptions("m"),
        LoraOptions(use_peft=use_peft),
        TextOptions(),
        DataOptions("d"),
        TrainOptions(output_dir="out", **train),
        DPOOptions(),
        EngineOptions(layout=layout),  # type: ignore[arg-type]
        MonitorOptions(),
        GaudiOptions(),
    )


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, "--gradient_accumulation_steps 6"),
        ({"global_batch_size": 16}, "--per_device_train_batch_size 4;"),
        ({"layout": "padded"}, "--layout shared"),
        ({"per_device_train_batch_size": 1, "gradient_checkpointing": False}, "--gradient_checkpointing true"),
        ({"per_device_train_batch_size": 1}, "--use_peft true"),
        ({"per_device_train_batch_size": 1, "use_peft": True}, "shard it"),
    ],
)
def test_out_of_memory_is_a_line_that_names_the_cheapest_change(options: dict[str, Any], advice: str):
    with pytest.raises(UserError) as told, gpu.memory_told(run(**options)):
        torch.empty(1 << 50)  # of which no machine has the address space
    assert advice in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("CUDA out of memory")])
def test_other_errors_are_left_alone(error: Exception):
    with pytest.raises(type(error), match=str(error)), gpu.memory_told(run()):
        raise error


def test_cudas_own_error_is_told():
    with pytest.raises(UserError, match="the cheapest change is"), gpu.memory_told(run()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_on_a_gpu_workers_collate_and_adam_is_fused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train = TrainOptions(output_dir="out")
    there, here = gpu.arguments(train, on_cpu=False), gpu.arguments(train, on_cpu=True)
    assert (there["dataloader_num_workers"], there["optim"]) == (2, "adamw_torch_fused")
    assert there["dataloader_pin_memory"] and there["accelerator_config"] == {"non_blocking": True}
    assert here["dataloader_num_workers"] == 0 and "optim" not in here and not here["dataloader_pin_memory"]
    chosen = gpu.arguments(TrainOptions(output_dir="out", dataloader_num_workers=0, optim="sgd"), on_cpu=False)
    assert chosen["dataloader_num_workers"] == 0 and "optim" not in chosen


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_memory_in_segments_that_grow(monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None):
    monkeypatch.setattr(os, "environ", dict(before))
    runpy.run_path(str(tandem.__file__))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == after
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_an_engine_of_several_gpus_gets_segments_that_can_be_shared(monkeypatch: pytest.MonkeyPatch):
    """vLLM's processes import tandem again, which leaves what is set."""
    for before, after in (("expandable_segments:True", "expandable_segments:False"), ("backend:native",) * 2):
        monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": before})
        fix_segments()
        runpy.run_path(str(tandem.__file__))
        assert os.environ["PYTORCH_ALLOC_CONF"] == after


def test_eight_bit_optimizers_are_refused_over_sharded_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    eight = ON_GPU | {"optim": "adamw_8bit", "save_strategy": "no"}
    with pytest.raises(UserError, match="take no sharded weights"):
        check_launch(FSDP2, eight, cpu_asked=False, tp_size=1)
    with pytest.raises(UserError, match="take no sharded weights"):
        check_launch(TWO, eight, cpu_asked=False, tp_size=2)
    check_launch({}, eight, cpu_asked=False, tp_size=1)


def test_four_bits_in_float16_are_refused():
    lora, train = LoraOptions(use_peft=True, load_in_4bit=True), TrainOptions(output_dir="out", fp16=True)
    with pytest.raises(UserError, match="--fp16 with --load_in_4bit"):
        check_training(ModelOptions("m"), lora, train)
