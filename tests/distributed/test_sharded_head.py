"""A trained head that FSDP shards and no forward calls learns from the pairs of all processes.

As a unit of its own each process's part of it would learn from that process's pairs alone: of a model of several
modalities, and of a head that an adapter trains whole, of which accelerate finds no norm to put it with.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tandem.training.trainers.sharding import called_with_head
from tests import tiny, wide
from tests.distributed.launches import run, steps

STEPS = 3


@pytest.fixture(scope="module")
def untied_gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = wide.save_model(tmp_path_factory.mktemp("gemma3"), "gemma3", "float32")
    config = AutoConfig.from_pretrained(made)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    folder = made / "untied"
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("llama"), tied=False)


def flags(model: Path, data: Path, folder: Path, processes: int, variant: str) -> list[str]:
    words = f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --ref_cache {folder}-cache --bf16 false
        --max_steps {STEPS} --logging_steps 1 --learning_rate 1e-3 --save_strategy no --adam_epsilon 1e-4
        --per_device_train_batch_size 2 --gradient_accumulation_steps {4 // processes} {variant}
    """
    return words.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "variant"),
    [("untied_gemma3", ""), ("llama", "--use_peft true --lora_modules_to_save lm_head")],
    ids=["several modalities", "saved with an adapter"],
)
def test_it_learns_from_all_pairs(
    script: Callable[[str], ModuleType],
    request: pytest.FixtureRequest,
    tiny_data: Path,
    tmp_path: Path,
    model: str,
    variant: str,
):
    folder = request.getfixturevalue(model)
    one, two = tmp_path / "one", tmp_path / "two"
    script("dpo").main(flags(folder, tiny_data, one, 1, variant))
    run("fsdp", 2, ["dpo.py", *flags(folder, tiny_data, two, 2, variant)])
    for mine, other in zip(steps(two), steps(one), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    name = "adapter_model.safetensors" if variant else "model.safetensors"
    ours, theirs = (load_file(each / name) for each in (two, one))
    head = next(name for name in theirs if "lm_head" in name)
    assert (ours[head] - theirs[head]).abs().max() < 1e-5


def test_it_is_gathered_with_what_the_forward_calls(untied_gemma3: Path, llama: Path):
    with torch.device("meta"):
        gemma3 = Gemma3ForConditionalGeneration(AutoConfig.from_pretrained(untied_gemma3))
        plain = LlamaForCausalLM(AutoConfig.from_pretrained(llama))
        small = {"num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2}
        opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=32))
        falcon = FalconForCausalLM(FalconConfig(**small))
    assert called_with_head(gemma3) is gemma3.model.language_model.norm
    assert called_with_head(plain) is plain.model.norm
    assert called_with_head(opt) is opt.model.decoder.final_layer_norm
    assert called_with_head(falcon) is falcon.transformer.ln_f
    del plain.model.norm
    assert called_with_head(plain) is plain.model
    plain.lm_head.weight = plain.model.embed_tokens.weight
    assert called_with_head(plain) is None
