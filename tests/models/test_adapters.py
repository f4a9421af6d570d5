"""Merged, an adapter computes what it did on its base: in float32 to 1e-5, in bfloat16 rounded once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tandem.errors import UserError
from tandem.models.adapters import merged
from tandem.models.load import load_model
from tandem.models.merge import MergeOptions, merge
from tandem.options.model import ModelOptions
from tests import tiny
from tests.adapters import KINDS, save_kind
from tests.engine.tiny_models import CONFIGS, VOCABULARY, tiny_model

FAST = ("embeddings", "saved_modules", "lora_tokens", "pissa")
IDS = torch.arange(6, 60)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def differs(adapter: Path, folder: Path) -> float:
    """Largest difference of the merged folder's logits from those of the adapter on its base."""
    merge(MergeOptions(str(adapter), str(folder)))
    on_base = load_model(ModelOptions(str(adapter)))
    return (logits(AutoModelForCausalLM.from_pretrained(folder)) - logits(on_base)).abs().max().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAST)
def test_merged_is_what_was_trained(kind: str, tied: bool, tmp_path: Path):
    model = tiny.save_model(tmp_path / "model", tied=tied)
    adapter = save_kind(tmp_path / "adapter", model, kind)
    moved = logits(AutoModelForCausalLM.from_pretrained(model)) - logits(load_model(ModelOptions(str(adapter))))
    assert moved.abs().max() > 0.1
    assert differs(adapter, tmp_path / "merged") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"lora_bias"}))
def test_every_adapter_merged_is_what_was_trained(kind: str, tied: bool, tmp_path: Path):
    adapter = save_kind(tmp_path / "adapter", tiny.save_model(tmp_path / "model", tied=tied), kind)
    assert differs(adapter, tmp_path / "merged") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora", "modules_to_save", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name: str, kind: str, tmp_path: Path):
    """In float32 the merged model is the adapted one; in bfloat16 it is that, rounded once."""
    changes = {"tie_word_embeddings": True} if kind == "tied" else {}
    tiny_model(name, **changes).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    linear = {part.rpartition(".")[2] for part, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    conv = {part.rpartition(".")[2] for part, layer in model.named_modules() if type(layer).__name__ == "Conv1D"}
    head = {part.rpartition(".")[2] for part, layer in model.named_modules() if layer is model.get_output_embeddings()}
    table = {part.rpartition(".")[2] for part, layer in model.named_modules() if layer is model.get_input_embeddings()}
    targets = (linear | conv) - head - ({"out_proj"} if name == "FalconH1" else set())
    own = {
        "lora": {},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "modules_to_save": {"modules_to_save": sorted(head | table)},
        "tied": {},
    }[kind]
    if kind == "tied":
        targets |= table
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=sorted(targets), init_lora_weights=False, **own)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, VOCABULARY)[None]

    def log_probs(of: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return of.eval()(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    on_base = log_probs(load_model(ModelOptions(str(tmp_path / "adapter"))))
    merge(MergeOptions(str(tmp_path / "adapter"), str(tmp_path / "merged")))
    whole = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (whole - on_base).abs().max() < 1e-5 * max(1.0, on_base.abs().max().item())
    merge(MergeOptions(str(tmp_path / "adapter"), str(tmp_path / "half"), dtype="bfloat16"))
    exact, half = (load_file(tmp_path / folder / "model.safetensors") for folder in ("merged", "half"))
    assert exact.keys() == half.keys()
    assert all(torch.equal(half[key], exact[key].to(half[key].dtype)) for key in exact)


def test_bfloat16_is_the_float32_merge_rounded_once(tmp_path: Path):
    model = tiny.save_model(tmp_path / "model", dtype="bfloat16")
    adapter = save_kind(tmp_path / "adapter", model, "embeddings")
    for dtype in ("float32", "bfloat16", "auto"):
        merge(MergeOptions(str(adapter), str(tmp_path / dtype), dtype=dtype))
    exact, half, auto = (load_file(tmp_path / name / "model.safetensors") for name in ("float32", "bfloat16", "auto"))
    assert all(torch.equal(half[name], weight.to(torch.bfloat16)) for name, weight in exact.items())
    assert all(torch.equal(half[name], auto[name]) for name in exact)
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}


def test_a_merge_that_is_another_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PEFT alone would add the embedding's adapter to the tied head as well."""
    adapter = save_kind(tmp_path / "adapter", tiny.save_model(tmp_path / "model", tied=True), "embeddings")
    monkeypatch.setattr("tandem.models.adapters.untie", lambda model: None)
    with pytest.raises(UserError, match=r"--adapter .*: merged, it is another model than it was on its base"):
        merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_what_is_no_change_of_weights_is_one_line(tiny_model: Path):
    from peft import PromptTuningConfig

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4
    )
    prompted = get_peft_model(base, config)
    assert isinstance(prompted, PeftModel)
    with pytest.raises(UserError, match="cannot be merged: PROMPT_TUNING is no change of its base's weights"):
        merged(prompted)


def hub_cache(folder: Path, name: str, revisions: dict[str, Path]) -> None:
    """The Hub's cache, as if `name` had been downloaded at each of its revisions."""
    home = folder / f"models--{name.replace('/', '--')}"
    for number, (revision, model) in enumerate(revisions.items()):
        commit = str(number) * 40
        shutil.copytree(model, home / "snapshots" / commit)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("flags", [("--model_revision", "v2"), ()])
def test_an_adapter_remembers_the_revision_of_its_base(
    flags: tuple[str, ...],
    tmp_path: Path,
    tiny_data: Path,
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
):
    """One that was named, and the main branch as it was then."""
    one, two = (tiny.save_model(tmp_path / f"v{seed}", seed=seed) for seed in (1, 2))
    cache = tmp_path / "hub"
    hub_cache(cache, "org/tiny", {"main": one, "v2": two})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    common = ["--model_name_or_path", "org/tiny", "--dataset_name", str(tiny_data), "--output_dir", str(tmp_path / "a")]
    quick = ["--max_steps", "1", "--max_train_samples", "4", "--bf16", "false", "--ref_cache", str(tmp_path / "cache")]
    script("dpo").main([*common, *quick, "--use_peft", "true", "--learning_rate", "1e-4", *flags])
    (cache / "models--org--tiny" / "refs" / "main").write_text(("0" if flags else "1") * 40)
    assert differs(tmp_path / "a", tmp_path / "merged") < 1e-5
    result, trained_on, other = (
        logits(AutoModelForCausalLM.from_pretrained(folder))
        for folder in (tmp_path / "merged", *((two, one) if flags else (one, two)))
    )
    assert (result - trained_on).abs().max() < 0.05
    assert (result - other).abs().max() > 0.1


def test_a_relative_base_is_found_from_any_folder(
    tmp_path: Path, tiny_data: Path, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    tiny.save_model(tmp_path / "m" / "base")
    monkeypatch.chdir(tmp_path)
    common = ["--model_name_or_path", "m/base", "--dataset_name", str(tiny_data), "--output_dir", "a"]
    quick = ["--max_steps", "1", "--max_train_samples", "4", "--bf16", "false", "--save_strategy", "no"]
    script("sft").main([*common, *quick, "--use_peft", "true"])
    named = json.loads(Path("a/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "m" / "base")
    os.mkdir("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    merge(MergeOptions(str(tmp_path / "a"), str(tmp_path / "merged")))
