"""What is refused on MPS. No Apple GPU is here: torch is told that there is one."""

import copy
from typing import Any

import pytest
import torch

from tandem.answers.backends.open import open_backend
from tandem.answers.backends.options import GenerationOptions
from tandem.devices import fast_bf16
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import GaudiOptions, TrainOptions
from tandem.training.trainers import select, trl

MODEL, LORA, TRAIN = ModelOptions(model_name_or_path="m"), LoraOptions(), TrainOptions(output_dir="o")


@pytest.fixture(autouse=True)
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (13, 3))


def chosen(model: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **train: Any) -> Any:
    options = [copy.copy(default) for default in (MODEL, LORA, TRAIN)]
    for each, changes in zip(options, (model or {}, lora or {}, train), strict=True):
        vars(each).update(changes)  # past their own checks, which want bitsandbytes
    return select.builders(*options, GaudiOptions())


def test_the_defaults_are_taken_and_bf16_is_not_among_them():
    assert chosen() is trl
    assert not fast_bf16()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bf16": True}, "--bf16 needs macOS 14"),
        ({"optim": "adamw_8bit"}, "--optim adamw_8bit needs CUDA"),
        ({"lora": {"load_in_4bit": True, "use_peft": True}}, "--load_in_4bit needs CUDA"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, "--attn_implementation flash_attention_2 needs CUDA"),
        ({"tp_size": 2}, "2 processes: an Apple GPU takes one"),
    ],
)
def test_what_mps_lacks_is_refused_by_name_and_the_cpu_is_not(asked: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as refusal:
        chosen(**asked)
    assert str(refusal.value).startswith("on MPS: ")
    assert chosen(**asked | {"use_cpu": True}) is trl


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes: an Apple GPU takes one"):
        chosen()


def test_bf16_is_taken_where_macos_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    assert chosen(bf16=True) is trl


def test_vllm_is_refused():
    options = GenerationOptions()
    options.backend = "vllm"  # past its own check, which wants vLLM
    engine = open_backend(["m"], options, SamplingOptions())
    with pytest.raises(UserError, match="--backend vllm does not run on MPS"), engine:
        pass
