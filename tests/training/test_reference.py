"""Where no reference is named it is the policy before training: the loss of the first step is ln 2, cold and warm."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tandem.engine import ref_cache
from tandem.engine.modes import disable_dropout
from tandem.engine.ref_cache import fingerprint
from tandem.errors import UserError
from tandem.models.merge import MergeOptions, merge
from tandem.training.trainers.reference import gap
from tests import tiny
from tests.adapters import KINDS, config_of, save_kind

LN2 = math.log(2)
STEP = {"max_steps": 1, "max_train_samples": 4, "save_strategy": "no", "bf16": "false", "logging_steps": 1}
FAST = ("dora", "embeddings", "loha", "pissa", "bias")
Step = Callable[..., float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture
def first_loss(script: Callable[[str], ModuleType], tiny_data: Path, tmp_path: Path) -> Step:
    """`first_loss(model, flag=value, …)`: of a run of one step, which shares a cache with the test's other runs."""
    runs: list[Path] = []

    def run(model: Path, **flags: Any) -> float:
        runs.append(tmp_path / f"run{len(runs)}")
        given = {"model_name_or_path": model, "dataset_name": tiny_data, "output_dir": runs[-1]} | STEP
        given |= {"ref_cache": tmp_path / "cache", "gradient_checkpointing": "false"} | flags
        script("dpo").main([text for name, value in given.items() for text in (f"--{name}", str(value))])
        history = json.loads((runs[-1] / "training_metrics.json").read_text())["log_history"]
        return history[0]["loss"]

    return run


def begins_at_ln_2(first_loss: Step, adapter: Path, **flags: Any) -> None:
    """Cold, where the reference is scored, and warm, where it is read."""
    for _ in range(2):
        assert first_loss(adapter, **flags) == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("kind", FAST)
def test_an_adapter_goes_on_from_itself(kind: str, model: Path, tmp_path: Path, first_loss: Step):
    begins_at_ln_2(first_loss, save_kind(tmp_path / kind, model, kind))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_goes_on_from_itself(kind: str, layout: str, model: Path, tmp_path: Path, first_loss: Step):
    adapter = save_kind(tmp_path / kind, model, kind)
    if kind == "pvera":  # which draws its weights at random in training: the run checks itself in evaluation mode
        first_loss(adapter, layout=layout)
    else:
        begins_at_ln_2(first_loss, adapter, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flags", [{}, {"use_peft": True}, {"use_peft": True, "lora_target_modules": ".*q_proj"}])
def test_what_begins_at_its_base(flags: dict[str, Any], tied: bool, layout: str, tmp_path: Path, first_loss: Step):
    begins_at_ln_2(first_loss, tiny.save_model(tmp_path / "base", tied=tied), layout=layout, **flags)


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}])
def test_the_cache_knows_an_adapters_settings(change: dict[str, Any], model: Path, tmp_path: Path, first_loss: Step):
    """The weights are the same, what they are multiplied by is not."""
    adapter = save_kind(tmp_path / "adapter", model, "lora")
    assert first_loss(adapter) == pytest.approx(LN2, abs=1e-6)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    begins_at_ln_2(first_loss, adapter)


def test_the_reference_is_scored_without_dropout(model: Path, tmp_path: Path, first_loss: Step):
    """A run with dropout fills the cache; one without, which reads it, begins at its reference."""
    adapter = save_kind(tmp_path / "adapter", model, "lora", lora_dropout=0.5)
    assert first_loss(adapter, disable_dropout="false") != pytest.approx(LN2, abs=1e-6)
    assert first_loss(adapter) == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("SeedOss", {"attention_dropout": 0.3, "residual_dropout": 0.3, "head_dim": 8, "num_key_value_heads": 2}),
    ],
)
def test_dropout_that_is_a_function_is_off_too(name: str, settings: dict[str, Any], tmp_path: Path, first_loss: Step):
    text = tiny.tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(vocab_size=len(text), **shape | settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "model")
    begins_at_ln_2(first_loss, tmp_path / "model")
    assert first_loss(tmp_path / "model", disable_dropout="false") != pytest.approx(LN2, abs=1e-4)


def test_an_adapters_own_dropouts_are_off_too():
    """LoKr drops ranks and whole modules by numbers, BOFT by a module of its own."""
    torch.manual_seed(0)
    for kind, drops in (("lokr", {"rank_dropout": 0.5, "module_dropout": 0.5}), ("boft", {"boft_dropout": 0.5})):
        layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
        settings = KINDS[kind][1] | {"target_modules": ["0", "1"]} | drops
        adapted = get_peft_model(layers, config_of(kind, task_type=None, init_weights=False, **settings)).train()
        inputs = torch.randn(8, 16)
        assert not all(torch.equal(adapted(inputs), adapted(inputs)) for _ in range(8))
        disable_dropout(adapted)
        assert all(torch.equal(adapted(inputs), adapted(inputs)) for _ in range(8))


@pytest.mark.parametrize("kind", ["lora", "embeddings"])
def test_an_adapter_as_the_reference(kind: str, tiny_model: Path, tmp_path: Path, first_loss: Step):
    """The same as once it is merged: cold, after its base has filled the cache, and warm."""
    adapter = save_kind(tmp_path / "adapter", tiny_model, kind)
    merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    assert first_loss(tiny_model) == pytest.approx(LN2, abs=1e-6)
    cold, warm, of_merged = (
        first_loss(tiny_model, reference_model=name) for name in (adapter, adapter, tmp_path / "merged")
    )
    assert abs(cold - LN2) > 1e-3
    assert warm == cold == pytest.approx(of_merged, abs=1e-5)


def test_an_adapter_of_prompts_is_refused_as_the_reference(tiny_model: Path, tmp_path: Path, first_loss: Step):
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4
    )
    get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(UserError, match=r"/p: cannot be merged: PROMPT_TUNING is no change of its base's weights"):
        first_loss(tiny_model, reference_model=tmp_path / "p")


def test_a_reference_that_is_another_model_is_told_before_anything_is_trained(
    model: Path, tmp_path: Path, first_loss: Step, monkeypatch: pytest.MonkeyPatch
):
    adapter = save_kind(tmp_path / "adapter", model, "lora")
    monkeypatch.setattr("tandem.training.trainers.reference_scorer.fingerprint", lambda *_, **__: "one for all")
    first_loss(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"the reference is not the policy before training: .* Nothing was trained"):
        first_loss(adapter)
    first_loss(adapter, reference_model=model)


def test_weights_are_hashed_once_as_long_as_their_files_stay(
    model: Path, tmp_path: Path, first_loss: Step, monkeypatch: pytest.MonkeyPatch
):
    hashed = []

    def hash_of(*arguments: Any, **keywords: Any) -> str:
        hashed.append(fingerprint(*arguments, **keywords))
        return hashed[-1]

    monkeypatch.setattr("tandem.training.trainers.reference_scorer.fingerprint", hash_of)
    monkeypatch.setattr(ref_cache, "STARTED", time.time() + 3600)
    own = tmp_path / "own"
    shutil.copytree(model, own)
    losses = [first_loss(own), first_loss(own)]
    assert len(hashed) == 1
    weights = load_file(own / "model.safetensors")
    save_file({name: 1.5 * weight for name, weight in weights.items()}, own / "model.safetensors", {"format": "pt"})
    losses.append(first_loss(own))
    assert len(set(hashed)) == 2
    assert losses == pytest.approx([LN2] * 3, abs=1e-6)
    adapter = save_kind(tmp_path / "adapter", own, "lora")
    assert [first_loss(adapter), first_loss(adapter)] == pytest.approx([LN2] * 2, abs=1e-6)
    assert len(set(hashed)) == len(hashed) == 3


def test_a_gap_is_per_token_or_per_nat():
    policy, reference = torch.tensor([-3.0, -5.0]), torch.tensor([-3.5, -5.0])
    assert gap(policy, reference, torch.tensor([2, 3])).item() == pytest.approx(0.5 / 8.5)
    assert gap(policy, reference, torch.tensor([6, 14])).item() == pytest.approx(0.5 / 20)
