"""A model without its weights: fewer layers of it, its layout, and steps that take values."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tandem.engine import own_logits
from tandem.errors import UserError
from tandem.models.load import load_model, load_tokenizer
from tandem.options.model import ModelOptions
from tandem.options.parsing import parse
from tandem.training import foreseen
from tandem.training.hardware import Hardware
from tandem.training.option_sets import DPOOptionSet, classes
from tandem.training.plan import Plan, moments_by_values, size
from tandem.training.preparation import training_rows
from tests import families, tiny

ALONE = Hardware("cpu", 1, frozenset(), copies_gradients=False, limit=None, is_here=True)


@pytest.fixture
def plan(tiny_data: Path, tmp_path: Path) -> Callable[[Path], Plan]:
    def make(model: Path) -> Plan:
        flags = ["--model_name_or_path", str(model), "--dataset_name", str(tiny_data), "--output_dir", str(tmp_path)]
        flags += ["--bf16", "false", "--per_device_train_batch_size", "2", "--max_train_samples", "4"]
        run = DPOOptionSet(*parse(flags, classes(DPOOptionSet), prog="plan"))
        return Plan(run, ALONE, training_rows(run, load_tokenizer(run.model)), libraries=0)

    return make


@pytest.mark.slow
def test_layers_are_counted_on_as_those_between(
    plan: Callable[[Path], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Six layers by random numbers in one and two, against all six without numbers."""
    text = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "six")
    text.save_pretrained(tmp_path / "six")
    figures = plan(tmp_path / "six")
    expected = figures.moments(figures.rehearse(figures.model))
    monkeypatch.setattr(foreseen, "LIMIT", 4 * size(figures.build(2)))
    counted = moments_by_values(figures)
    for part in ("weights", "gradients", "optimizer"):
        assert [usage[part] for usage in counted] == [usage[part] for usage in expected]
    activations = [usage["activations"] for usage in expected]
    assert [usage["activations"] for usage in counted] == pytest.approx(activations, rel=0.1)
    monkeypatch.setattr(foreseen, "LIMIT", 1000)
    with pytest.raises(UserError, match="no plan: what it does depends on values"):
        moments_by_values(figures)


def test_a_model_that_decides_by_values_has_a_plan(plan: Callable[[Path], Plan], tmp_path: Path):
    """How many tokens each of JetMoE's experts gets is read from values, which fake tensors have not."""
    figures = plan(families.save("jetmoe", tmp_path / "model"))
    with pytest.raises(RuntimeError):
        figures.moments(figures.rehearse(figures.model))
    assert figures.peak.activations > 0
    weights = sum(4 * parameter.numel() for parameter in figures.model.parameters())
    assert figures.peak.weights == weights


@pytest.mark.parametrize(
    ("name", "layers", "kept"),
    [("mamba2", 1, 1), ("qwen3_next", 1, 1), ("longcat_flash", 1, 2), ("gpt2", 1, 1), ("prophetnet", 1, 2)],
)
def test_fewer_layers(name: str, layers: int, kept: int):
    config = foreseen.shortened(families.config(name, 300), layers)
    assert foreseen.depth(config) == kept
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("name", "layers", "kept"), [("llama", 1, 1), ("rwkv", 1, 2), ("zamba", 2, 4)])
def test_no_fewer_layers_than_a_model_can_have(name: str, layers: int, kept: int):
    options = ModelOptions(name)
    config = families.config(name, 300)
    shortest = foreseen.least(config, options, layers)
    assert foreseen.depth(shortest) == kept
    foreseen.model_of(shortest, options, "cpu")
    assert foreseen.depth(foreseen.least(config, options, 9)) == foreseen.depth(config)


@pytest.mark.parametrize("name", ["mllama", "qwen2_5_vl", "llama"])
def test_the_class_is_the_one_that_a_run_loads(name: str, tmp_path: Path):
    """The class that the configuration names, though no table of causal language models has it."""
    folder = families.save(name, tmp_path / name)
    options = ModelOptions(str(folder))
    loaded = load_model(options)
    planned = foreseen.model_of(foreseen.config_of(options), options, "meta")
    assert type(planned) is type(loaded)
    assert {own: each.shape for own, each in planned.named_parameters()} == {
        own: each.shape for own, each in loaded.named_parameters()
    }


def test_as_many_layers_as_have_all_kinds():
    config = families.config("qwen3_next", 300)
    for kinds, needed in ((["linear_attention"] * 3 + ["full_attention"], 4), (["full_attention"] * 4, 1)):
        config.num_hidden_layers, config.layer_types = 4, kinds
        assert foreseen.layers_of_all_kinds(config) == needed


def test_the_layout_is_the_one_a_run_settles_on(tmp_path: Path):
    """Said with its reason: layers that no packed row can serve, and logits that are not the head's."""
    ids = torch.arange(6, 60)
    for name, layout, reason in (
        ("llama", "shared", ""),
        ("lfm2", "padded", "it has layers of type conv"),
        ("modernbert-decoder", "padded", own_logits.REASON),
    ):
        folder = families.save(name, tmp_path / name)
        report = foreseen.layout(ModelOptions(str(folder)), "shared", ids, 100)
        assert (report.layout, report.reason) == (layout, reason)
