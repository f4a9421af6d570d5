"""Which modules FSDP shards one by one, and in what precision; in one process, whose shards are whole."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tandem.engine.precision import computed_in
from tandem.engine.ref_cache import RefCache
from tandem.errors import UserError
from tandem.training.trainers import reference_scorer
from tandem.training.trainers.sharding import check_saves_whole, exact_sums, layer_classes, shard_frozen

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_layers_are_found_by_the_architecture():
    assert layer_classes(Qwen3ForCausalLM(Qwen3Config(**SMALL, intermediate_size=64, vocab_size=64))) == [
        "Qwen3DecoderLayer"
    ]
    assert layer_classes(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64))) == ["GPT2Block"]


def test_classes_that_this_model_lacks_are_left_out(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model._no_split_modules = [*Gemma3ForConditionalGeneration._no_split_modules, "LlamaDecoderLayer"]
    assert layer_classes(model) == ["LlamaDecoderLayer"]


def test_without_a_list_of_its_own_the_longest_list_of_modules_counts(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model._no_split_modules = None
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    with pytest.raises(UserError, match="no repeated layers"):
        layer_classes(nn.Sequential(nn.Linear(2, 2)))


def test_outputs_are_left_as_they_are():
    """accelerate's own policy for bf16 rounds the outputs, and with them DPO's log-probs; float32 would double every
    layer's."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    policy = exact_sums(plugin.mixed_precision_policy)
    assert policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    assert exact_sums(None) is None


@pytest.mark.usefixtures("one_process")
def test_layers_hand_on_what_they_compute_in():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for module in (*layers, layers):
        fully_shard(module, mp_policy=exact_sums(MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)))
    seen = []
    layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    layers(torch.zeros(1, 4))
    assert seen == [torch.bfloat16]


@pytest.mark.usefixtures("one_process")
def test_the_precision_of_sharded_weights_is_what_fsdp_computes_in():
    model = nn.Linear(4, 4)
    assert computed_in(model, "cpu") == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert computed_in(model, "cpu") == torch.bfloat16
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert model.weight.dtype == torch.float32
    assert computed_in(model, "cpu") == torch.bfloat16


def test_layers_of_4_bits_have_a_precision_of_their_own():
    model = nn.Linear(4, 4)
    model.compute_dtype = torch.bfloat16  # as bitsandbytes' Linear4bit has it
    assert computed_in(model, "cpu") == torch.bfloat16


@pytest.mark.usefixtures("one_process")
def test_a_reference_is_sharded_layer_by_layer(tiny_model: Path):
    """TRL's own `prepare_fsdp` makes one unit of it. The policy may be of another architecture."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.transformer_cls_names_to_wrap = ["GPT2Block"]
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    sharded = shard_frozen(model, accelerator)
    assert all(isinstance(layer, FSDPModule) for layer in sharded.model.layers)
    assert not any(parameter.requires_grad for parameter in sharded.parameters())
    assert plugin.transformer_cls_names_to_wrap == ["GPT2Block"]
    ids = torch.arange(8)[None]
    expected = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    assert torch.allclose(sharded(ids).logits, expected, atol=1e-6)


def test_zero3_that_would_save_no_model_is_refused():
    def accelerator(stage: int, **zero: bool) -> SimpleNamespace:
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))

    check_saves_whole(accelerator(2))
    check_saves_whole(accelerator(3, stage3_gather_16bit_weights_on_model_save=True))
    with pytest.raises(UserError, match="zero3_save_16bit_model: true"):
        check_saves_whole(accelerator(3, stage3_gather_16bit_weights_on_model_save=False))


@pytest.mark.parametrize("main", [True, False])
def test_whole_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, main: bool):
    """On rank 0 alone: every rank of a node reading all weights of one disk would only wait for it."""
    hashed: list[nn.Module] = []
    monkeypatch.setattr(reference_scorer, "of_rank_0", lambda value: value)
    monkeypatch.setattr(reference_scorer, "fingerprint", lambda model, adapter: hashed.append(model) or "a hash")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=main))
    given = SimpleNamespace(name_or_path="m")
    scorer: Any = reference_scorer.ReferenceScorer
    scorer(trainer, RefCache(str(tmp_path)), None, given=given, added=None).identify(nn.Linear(2, 2))
    assert len(hashed) == (1 if main else 0)
