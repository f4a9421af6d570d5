"""What of a model text reaches, what of it chooses experts, and that neither a tower nor a router is trained."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

from tandem.models.lora import lora_config
from tandem.models.reached import beside_text, expert_parameters, hold_still, routers
from tandem.options.model import LoraOptions
from tandem.training.trainers.sharding import trained
from tests import families, wide

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def model_of(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(families.config(name, 300))


def adapted(model: Any, **options: Any) -> Any:
    options = {"use_peft": True, "lora_r": 2} | options
    return get_peft_model(model, lora_config(LoraOptions(**options), model=model))


def test_all_that_is_trained_of_a_multimodal_model_gets_a_gradient():
    """DDP stops at the first step that leaves a trained parameter out."""
    model = wide.gemma3(300, IDS)
    assert beside_text(model) == ["model.multi_modal_projector", "model.vision_tower"]
    hold_still(model)
    model(input_ids=torch.arange(5, 40)[None]).logits.sum().backward()
    trained_ones = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained_ones.items() if parameter.grad is None] == []
    assert len(trained_ones) == len(list(model.get_decoder().parameters()))  # the head is tied
    assert trained(model).endswith("; not model.multi_modal_projector, model.vision_tower, which text does not reach")


def test_nothing_of_a_text_model_is_held_still():
    for name in ("llama", "gpt2", "mamba2", "opt"):
        model = model_of(name)
        assert beside_text(model) == []
        hold_still(model)
        assert all(parameter.requires_grad for parameter in model.parameters()), name


def test_parts_with_configurations_of_their_own_are_no_towers():
    """BLT's encoder, decoder and middle have one each; what ends its patches is passed, without a gradient."""
    model = model_of("blt")
    assert beside_text(model) == []
    hold_still(model)
    still = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == {"patcher"}
    assert not [name for name in adapted(model).base_model.targeted_module_names if "patcher" in name]


def test_a_table_of_sines_is_not_trained():
    model = model_of("marian").requires_grad_(True)  # as one that was loaded
    hold_still(model)
    still = [name for name, each in model.named_parameters() if not each.requires_grad and "encoder_attn" not in name]
    assert still == ["model.decoder.embed_positions.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "mamba",
        "falcon_mamba",
        "jamba",
        "gemma3n_text",
        "blt",
        "git",
        "mllama",
        "phi4_multimodal",
        "prophetnet",
        "bart",
        "axk2",
        "longcat_flash",
    ],
)
def test_all_of_an_adapter_gets_a_gradient(name: str):
    """Layers whose weights alone are read, and those that nothing passes, have none."""
    torch.manual_seed(0)
    policy = adapted(model_of(name))
    policy.train()(input_ids=torch.randint(6, 300, (2, 64)), use_cache=False).logits.sum().backward()
    assert [own for own, each in policy.named_parameters() if each.requires_grad and each.grad is None] == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("qwen2_moe", {"mlp.shared_expert_gate"}),
        ("jetmoe", {"mlp.router.layer", "self_attention.experts.router.layer"}),
        ("axk2", {"self_attn.indexer.weights_proj", "self_attn.indexer.wk", "self_attn.indexer.wq_b"}),
        ("llama4_text", {"feed_forward.router"}),
        ("llama", set()),
    ],
)
def test_no_router_gets_an_adapter(name: str, found: set[str]):
    model = model_of(name)
    assert {part.split(".", 3)[-1] for part in routers(model)} == found
    policy = adapted(model)
    assert not [part for part in policy.base_model.targeted_module_names if part in routers(model)]
    assert len(policy.base_model.targeted_module_names) >= 2


def test_the_start_table_says_whether_experts_are_adapted():
    """PEFT has `all-linear` mean the experts of some families, and the router's matrix with them; of others neither."""
    line = trained(adapted(model_of("qwen3_moe")))
    assert line.endswith(
        "the adapter's: down_proj (2), gate_up_proj (2), k_proj (2), o_proj (2), q_proj (2), v_proj (2)"
    )
    line = trained(adapted(model_of("qwen3_moe"), lora_dropout=0.1))  # which an adapter of parameters has not
    assert "the adapter's: k_proj (2), o_proj (2), q_proj (2), v_proj (2); no expert has one" in line

    model = model_of("granitemoehybrid")
    ends = expert_parameters(model)
    line = trained(adapted(model))
    assert line.endswith(f"; no expert has one: --lora_target_parameters {' '.join(ends)}")
    # And what it says to do does it
    line = trained(adapted(model_of("granitemoehybrid"), lora_target_parameters=ends))
    assert "no expert" not in line
    assert all(f"{end.rpartition('.')[2]} (2)" in line for end in ends)
