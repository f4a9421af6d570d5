"""A CUDA GPU of before Ampere, as Colab's T4: torch says that it has bfloat16 and emulates it. None is here: torch is
told that there is one."""

import sys
from types import ModuleType

import pytest
import torch

from tandem.devices import fast_bf16, gpu_without_bf16
from tandem.errors import UserError
from tandem.evaluation.evaluate import EvaluateOptions
from tandem.models import load
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import TrainOptions, check_training
from tandem.training.stages import _arguments

MODEL = ModelOptions("gpt2")


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)


def check(**train: object) -> None:
    check_training(MODEL, LoraOptions(), TrainOptions("out", **train))


@pytest.mark.usefixtures("t4")
def test_bf16_is_refused_by_name_and_fp16_is_not():
    with pytest.raises(UserError, match="--bf16: Tesla T4 has no bfloat16, only a slow emulation: use --fp16, or"):
        check(bf16=True)
    with pytest.raises(UserError, match="--eval_bf16: Tesla T4 has no bfloat16"):
        EvaluateOptions("gpt2", sft_model="m", eval_bf16=True)
    check(fp16=True)
    check(bf16=True, use_cpu=True)
    EvaluateOptions("gpt2", sft_model="m")


@pytest.mark.usefixtures("t4")
def test_bf16_is_not_the_default_there():
    assert not fast_bf16()
    assert not _arguments(TrainOptions("out"), MODEL)["bf16"]
    arguments = _arguments(TrainOptions("out", fp16=True), MODEL)
    assert arguments["fp16"] and not arguments["bf16"]


@pytest.mark.usefixtures("t4")
def test_layers_of_4_bits_compute_in_float16_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    assert load._four_bits().bnb_4bit_compute_dtype == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert load._four_bits().bnb_4bit_compute_dtype == torch.bfloat16


def test_other_devices_have_no_such_gpu(monkeypatch: pytest.MonkeyPatch):
    assert gpu_without_bf16() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert gpu_without_bf16() is None
    check(bf16=True)
