"""The parts of the Gaudi trainer that need no optimum-habana: what is chosen, refused and set."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tandem.errors import UserError
from tandem.models import habana
from tandem.options.losses import LOSSES, DPOOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import GaudiOptions, TrainOptions
from tandem.training.trainers import gaudi_settings, select
from tandem.training.trainers.topology import check_launch

MODEL, LORA = ModelOptions(model_name_or_path="m"), LoraOptions()
TRAIN, DPO = TrainOptions(output_dir="o"), DPOOptions()


class Hpu:
    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 8


def chosen(train: TrainOptions = TRAIN, dpo: DPOOptions = DPO, gaudi: GaudiOptions | None = None) -> Any:
    return select.builders(MODEL, LORA, train, gaudi or GaudiOptions(), dpo)


def test_without_an_hpu_it_is_trl():
    from tandem.training.trainers import trl

    assert chosen() is trl


def test_an_hpu_without_optimum_habana_is_trl_with_one_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from tandem.training.trainers import trl

    monkeypatch.setattr(torch, "hpu", Hpu(), raising=False)
    with caplog.at_level("WARNING", "tandem"):
        assert chosen() is trl
    assert "experimental" in caplog.text


def test_an_hpu_with_optimum_habana_is_gaudi(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "hpu", Hpu(), raising=False)
    monkeypatch.setattr(habana, "has_optimum_habana", lambda: True)
    with pytest.raises(ModuleNotFoundError, match="optimum"):  # it goes for the real one
        chosen()


def test_hpus_are_counted_by_intels_plugin(monkeypatch: pytest.MonkeyPatch):
    """torch's own count, 0 here, would refuse every launch."""
    monkeypatch.setattr(torch, "hpu", Hpu(), raising=False)
    arguments = {"use_cpu": False, "bf16": True, "fp16": False, "save_strategy": "steps"}
    for processes in (1, 8):
        launched = {"LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        check_launch(launched, arguments, cpu_asked=False, tp_size=1)
    with pytest.raises(UserError, match="9 processes on this machine, but it has 8 devices"):
        check_launch(launched | {"LOCAL_WORLD_SIZE": "9"}, arguments, cpu_asked=False, tp_size=1)


@pytest.mark.parametrize(
    ("value", "message"), [("cuda", "gaudi, trl or module:object"), ("gaudi", "needs optimum-habana")]
)
def test_a_wrong_choice_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str):
    monkeypatch.setenv("TANDEM_TRAINERS", value)
    with pytest.raises(UserError, match=message):
        chosen()


def test_gaudis_options_are_refused_elsewhere():
    with pytest.raises(UserError, match="--use_flash_attention is of optimum-habana"):
        chosen(gaudi=GaudiOptions(use_flash_attention=True))
    with pytest.raises(UserError, match="--flash_attention_recompute has no effect without --use_flash_attention"):
        GaudiOptions(flash_attention_recompute=True)


def check(lazy: bool = False, **options: Any) -> None:
    """`check_gaudi` with these options in whichever class has them."""
    instances = []
    for given in (MODEL, LORA, TRAIN, DPO):
        names = {field.name for field in dataclasses.fields(given)}
        instances.append(dataclasses.replace(given, **{k: v for k, v in options.items() if k in names}))
    gaudi_settings.check_gaudi(*instances, lazy=lazy)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_there_or_refused_by_name(loss: str):
    options = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
    if LOSSES[loss].on_gaudi:
        check(loss_type=[loss], **options)
    else:
        with pytest.raises(UserError, match=f"--loss_type {loss} "):
            check(loss_type=[loss], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"fp16": True},
        {"use_peft": True, "load_in_4bit": True},
        {"attn_implementation": "sdpa"},
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
        {"tp_size": 2},
        {"lazy": True, "gradient_checkpointing": True},
    ],
    ids=lambda options: list(options)[-1],
)
def test_what_has_no_meaning_there_is_refused_by_name(options: dict[str, Any]):
    with pytest.raises(UserError, match=f"--{list(options)[-1]}"):
        check(**options)


def test_the_defaults_are_taken_in_both_modes():
    check()
    check(lazy=True)
    check(lazy=True, use_peft=True, gradient_checkpointing=False)
    check(gradient_checkpointing=True)


ARGUMENTS = {
    "use_cpu": False, "warmup_steps": 0.0, "gradient_checkpointing": False, "trust_remote_code": False,
    "optim": "adamw_torch", "max_grad_norm": 1.0, "output_dir": "o",
}  # fmt: skip


@pytest.mark.parametrize(
    ("lazy", "graphs", "changes", "expected"),
    [
        (True, True, {}, (True, True, True)),
        (True, False, {}, (True, True, False)),  # policy and reference share a model
        (True, True, {"gradient_checkpointing": True}, (True, True, False)),
        (False, True, {}, (True, False, False)),
        (True, True, {"use_cpu": True}, (False, False, False)),
    ],
)
def test_modes(lazy: bool, graphs: bool, changes: dict[str, Any], expected: tuple[bool, ...]):
    own = gaudi_settings.training_arguments(ARGUMENTS | changes, lazy=lazy, graphs=graphs)
    assert (own["use_habana"], own["use_lazy_mode"], own["use_hpu_graphs_for_training"]) == expected
    assert "trust_remote_code" not in own


@pytest.mark.parametrize(
    ("given", "name", "value"), [(0.0, "warmup_ratio", 0.0), (0.1, "warmup_ratio", 0.1), (30.0, "warmup_steps", 30)]
)
def test_warmup_is_a_share_or_steps(given: float, name: str, value: float):
    own = gaudi_settings.training_arguments(ARGUMENTS | {"warmup_steps": given}, lazy=False, graphs=False)
    assert own[name] == value
    assert len({"warmup_ratio", "warmup_steps"} & own.keys()) == 1


def test_intels_kernels_only_for_what_they_compute():
    assert gaudi_settings.gaudi_config(ARGUMENTS)["use_fused_adam"]
    assert gaudi_settings.gaudi_config(ARGUMENTS)["use_fused_clip_norm"]
    other = gaudi_settings.gaudi_config(ARGUMENTS | {"optim": "sgd", "max_grad_norm": 0.0})
    assert not other["use_fused_adam"]
    assert not other["use_fused_clip_norm"]


def test_flags_of_the_forward():
    flash = GaudiOptions(use_flash_attention=True, flash_attention_causal_mask=True)
    llama = dict.fromkeys(["use_flash_attention", "flash_attention_causal_mask", "lazy_mode"])
    flags = gaudi_settings.model_flags(flash, llama, lazy=True, window=None)
    assert flags == {"use_flash_attention": True, "flash_attention_causal_mask": True, "lazy_mode": True}
    assert gaudi_settings.model_flags(GaudiOptions(), {}, lazy=True, window=8) == {}
    with pytest.raises(UserError, match="no flash attention"):
        gaudi_settings.model_flags(flash, {}, lazy=True, window=None)
    with pytest.raises(UserError, match="window of 8 tokens"):
        gaudi_settings.model_flags(flash, llama, lazy=True, window=8)


def test_settings_import_no_torch():
    names = "tandem.training.trainers.gaudi_settings, tandem.training.trainers.select"
    code = f"import sys, {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("1", "1")])
def test_lazy_mode_is_asked_for_before_torch_is_imported(given: str | None, found: str):
    code = "import os, sys, tandem; assert 'torch' not in sys.modules; print(os.environ['PT_HPU_LAZY_MODE'])"
    environment = {name: value for name, value in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    environment |= {"PT_HPU_LAZY_MODE": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found
