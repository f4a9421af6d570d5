"""Layers that are linear by their type alone get no adapter by default, which is said; asked for, one is refused."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from tandem.errors import UserError
from tandem.models.fits import forward_told
from tandem.models.lora import lora_config
from tandem.models.own_forward import own_forwards
from tandem.options.model import LoraOptions
from tandem.training.trainers.sharding import trained
from tests import families
from tests.adapters import KINDS, config_of

OF_DEEPSEEK = ["model.layers.0.self_attn.o_a_proj", "model.layers.1.self_attn.o_a_proj"]


class Normed(nn.Linear):
    """Of the same shapes, by weights that it divides by their length."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, normalize(self.weight), self.bias)


class Pair(nn.Linear):
    """Of two outputs."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class Shifted(nn.Linear):
    """With a parameter beside the weights."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.shift


class Written(nn.Linear):
    """nn.Linear's forward in other words."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


def model_of(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(families.config(name, 300))


def adapted(model: Any, **options: Any) -> Any:
    options = {"use_peft": True, "lora_r": 2} | options
    return get_peft_model(model, lora_config(LoraOptions(**options), model=model))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "left"),
    [(Normed, True), (Pair, True), (Shifted, True), (Written, False), (nn.Linear, False)],
)
def test_layers_are_told_by_what_they_compute(kind: type[nn.Linear], left: bool, bias: bool):
    layer = kind(32, 48, bias=bias)
    assert own_forwards(nn.ModuleDict({"layer": layer})) == ["layer"] * left
    torch.manual_seed(0)
    with torch.device("meta"):
        elsewhere = kind(512, 384, bias=bias)
    assert own_forwards(nn.ModuleDict({"layer": elsewhere})) == ["layer"] * left
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(1), torch.rand(1, generator=_seeded(0)))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_packed_weights_are_left_to_peft():
    layer = Normed(32, 32)
    layer.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    assert own_forwards(nn.ModuleDict({"layer": layer})) == []


def test_of_the_families():
    """DeepSeek-V4's grouped projections; Falcon's layers, whose forward is nn.Linear's, have an adapter as before."""
    with torch.device("meta"):
        assert own_forwards(model_of("deepseek_v4")) == OF_DEEPSEEK
        assert own_forwards(model_of("falcon")) == []


@pytest.mark.parametrize(
    ("more", "excluded"),
    [({}, set()), ({"lora_exclude_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"})],
)
def test_what_is_left_out_is_said(more: dict[str, Any], excluded: set[str]):
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Normed(64, 64, bias=False)
    policy = adapted(model, **more)
    names = {name.rpartition(".")[2] for name in policy.base_model.targeted_module_names}
    assert names == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"} - excluded
    assert trained(policy).endswith("up_proj (2)" + ", v_proj (2)" * ("v_proj" in names) + _left("o_proj"))
    others = adapted(model_of("llama"), lora_target_modules=["q_proj", "v_proj"])
    assert "; not" not in trained(others)


@pytest.mark.parametrize("kind", KINDS)
def test_what_any_adapter_trains_is_said(kind: str):
    """A run may go on from an adapter of any type, and not each has a list of modules to leave out."""
    policy = get_peft_model(model_of("llama"), config_of(kind))
    count = sum(each.numel() for each in policy.parameters() if each.requires_grad)
    assert trained(policy).startswith(f"{count:,} of ")
    assert "; not" not in trained(policy)


def test_a_regex_leaves_out_more():
    model = model_of("llama")
    model.model.layers[1].self_attn.o_proj = Normed(64, 64, bias=False)
    policy = adapted(model, lora_exclude_modules=[r".*\.mlp\..*|.*\.[qkv]_proj"])
    assert policy.base_model.targeted_module_names == ["model.layers.0.self_attn.o_proj"]
    assert trained(policy).endswith("the adapter's: o_proj (1); not o_proj (1), whose forward is no linear layer's")


def _left(name: str) -> str:
    return f"; not {name} (2), whose forward is no linear layer's"


def test_an_adapter_that_does_not_fit_is_one_line():
    """The same line in the forward of a batch, and through the layers' checkpoints."""
    policy = adapted(model_of("deepseek_v4"), lora_target_modules=["q_b_proj", "o_a_proj"])
    said = (
        r"^somewhere: PEFT's adapter on base_model.model.model.layers.0.self_attn.o_a_proj \(DeepseekV4GroupedLinear\) "
        r"fails \(lora/layer.py:\d+\): .*; leave that layer out: --lora_exclude_modules$"
    )
    ids = torch.arange(6, 30)[None]
    with pytest.raises(UserError, match=said), forward_told("somewhere"):
        policy(input_ids=ids)
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    with pytest.raises(UserError, match=said), forward_told("somewhere"):
        policy.train()(input_ids=ids)
