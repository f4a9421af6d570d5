"""A model, a tokenizer, data and an adapter that do not fit each other: one line each, and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ReformerConfig,
)

from tandem.errors import UserError
from tandem.models.fits import check_checkpointing, forward_told, positions_of
from tests import families, tiny

EMBEDDING = r"its embedding has 262 rows, and the tokenizer's '<\|im_end\|>' is token 262"
# By what is wrong: the model, further flags, and what is said
CASES: dict[str, tuple[str, str, str]] = {
    "a token beyond the embedding": ("more_tokens", "", EMBEDDING),
    "another tokenizer": ("plain", "--tokenizer_name_or_path {more_tokens}", EMBEDDING),
    "too few positions": ("short", "", r"a row has \d+ tokens, the model 24 positions: give --max_length 24 or less"),
    "no pad, no end": ("no_end", "", "neither a pad_token nor an eos_token"),
    "a template without system role": ("no_system", "", "refuses it: System role not supported; --system_prompt fold"),
    "no such module": ("plain", "--use_peft --lora_target_modules nope", "cannot be made as --lora_… ask: .*nope"),
    "a broken pattern": ("plain", "--use_peft --lora_target_modules q_proj(", "cannot be made as --lora_… ask"),
    "the head": ("plain", "--use_peft --lora_target_modules lm_head", "cannot be made as .*`lm_head`"),
    "a norm": ("plain", "--use_peft --lora_target_modules input_layernorm q_proj", "LlamaRMSNorm"),
    "nothing left": ("plain", "--use_peft --lora_exclude_modules .*", "modules were excluded"),
    "nothing to save": (
        "plain",
        "--use_peft --lora_modules_to_save nope",
        "--lora_modules_to_save nope: .* no such",
    ),
    "no such parameter": (
        "plain",
        "--use_peft --lora_target_parameters a.b",
        "_parameters a.b: .* no such",
    ),
    "no such layer": ("plain", "--use_peft --lora_layers_to_transform 0 9", "--lora_layers_to_transform 9: .* no such"),
    "trained tokens, tied": ("trained_tokens", "", "changes the head .*: merge it first"),
    "an adapter of more tokens": (
        "resized",
        "",
        r"loading state_dict.*: size mismatch for .*embed_tokens",
    ),
    "heads that do not divide": ("heads", "", "hidden size .32. is not a multiple"),
    "no such type": ("no_type", "", "float99"),
    "a pad token out of range": ("pad", "", "Padding_idx must be within"),
    "no such activation": ("activation", "", "cannot be loaded as a model: there is no 'nope'"),
    "a schedule's setting": ("plain", '--lr_scheduler_kwargs {{"nope":1}}', "--lr_scheduler_kwargs .*nope"),
    "a schedule without one": ("plain", "--lr_scheduler_type cosine_with_min_lr", "min_lr_rate should be set"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fits")
    made = {"plain": tiny.save_model(root / "plain", tied=False), "tied": tiny.save_model(root / "tied")}

    def copy(name: str, **config: Any) -> Path:
        made[name] = shutil.copytree(made["plain"], root / name)
        file = made[name] / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return made[name]

    text = tiny.tokenizer(tiny.TEMPLATE.replace("eos_token", "'<|im_end|>'"))
    text.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    text.save_pretrained(copy("more_tokens"))
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tiny.tokenizer(refusing + tiny.TEMPLATE).save_pretrained(copy("no_system"))
    file = copy("no_end", eos_token_id=None, pad_token_id=None) / "tokenizer_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: known[name] for name in known.keys() - {"eos_token", "pad_token"}}))
    (file.parent / "chat_template.jinja").write_text(tiny.TEMPLATE.replace("eos_token", "'.'"))
    made["short"] = root / "short"
    config = GPT2Config(vocab_size=262, n_positions=24, n_embd=32, n_layer=2, n_head=4, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(made["short"])
    tiny.tokenizer().save_pretrained(made["short"])
    for name, config in {
        "heads": {"num_attention_heads": 5},
        "no_type": {"dtype": "float99"},
        "pad": {"pad_token_id": 9999},
        "activation": {"hidden_act": "nope"},
    }.items():
        copy(name, **config)
    for name, base, settings in (
        ("trained_tokens", "tied", {"trainable_token_indices": [4, 5]}),
        ("resized", "plain", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("biased", "plain", {"bias": "all"}),
    ):
        model = AutoModelForCausalLM.from_pretrained(made[base])
        if name == "resized":
            model.resize_token_embeddings(300, mean_resizing=False)
        made[name] = root / name
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **settings)
        get_peft_model(model, adapter).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    turn = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    return {
        "pairs": tiny.save_pairs(folder / "pairs.jsonl", tiny.hh_rows(4)),
        "system": tiny.save_pairs(folder / "system.jsonl", [{"prompt": turn, **answers}]),
    }


@pytest.mark.parametrize("stage", ["dpo", "sft"])
@pytest.mark.parametrize("case", CASES)
def test_training_says_it_in_one_line(
    script: Callable[[str], ModuleType],
    models: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
    case: str,
    stage: str,
):
    name, flags, said = CASES[case]
    pairs = data["system" if name == "no_system" else "pairs"]
    common = f"--model_name_or_path {models[name]} --dataset_name {pairs} --output_dir {tmp_path / 'out'} --max_steps 1"
    cache = f"--ref_cache {tmp_path}" if stage == "dpo" else ""
    with pytest.raises(UserError, match=said):
        script(stage).main(f"{common} --bf16 false {cache} {flags.format(**models)}".split())


def test_an_adapter_with_biases_trains_on(
    script: Callable[[str], ModuleType], models: dict[str, Path], data: dict[str, Path], tmp_path: Path
):
    flags = f"--model_name_or_path {models['biased']} --dataset_name {data['pairs']} --output_dir {tmp_path / 'out'}"
    script("dpo").main(f"{flags} --max_steps 1 --bf16 false --ref_cache {tmp_path} --save_strategy no".split())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("more_tokens", EMBEDDING),
        ("short", r"a row has \d+ tokens, the model 24 positions: give a smaller --max_prompt_length"),
        ("no_end", "neither a pad_token nor an eos_token"),
        ("heads", "is not a multiple"),
        ("resized", "size mismatch"),
    ],
)
def test_generating_says_it_in_one_line(
    script: Callable[[str], ModuleType],
    models: dict[str, Path],
    data: dict[str, Path],
    tmp_path: Path,
    name: str,
    said: str,
):
    flags = f"--models a={models[name]} --dataset_name {data['pairs']} --output_dir {tmp_path} --max_new_tokens 4"
    with pytest.raises(UserError, match=said):
        script("generate").main(flags.split())


def test_positions_of_a_table():
    sizes = {"vocab_size": 64, "n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4}
    assert positions_of(GPT2LMHeadModel(GPT2Config(**sizes))) == 24
    assert positions_of(GPTJForCausalLM(GPTJConfig(**sizes, rotary_dim=4))) == 24
    small = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    assert positions_of(OPTForCausalLM(OPTConfig(vocab_size=64, max_position_embeddings=24, **small))) == 24


def test_what_fails_in_a_models_own_code_is_one_line():
    config = ReformerConfig(is_decoder=False)
    said = r"^somewhere: its own code fails on this data \(reformer/modeling_reformer.py:\d+\)"
    with pytest.raises(UserError, match=said), forward_told("somewhere"):
        AutoModelForCausalLM.from_config(config)
    policy = get_peft_model(
        AutoModelForCausalLM.from_config(families.config("git", 300)), LoraConfig(r=2, target_modules=["query"])
    )
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    said = r"^somewhere: .*\(git/modeling_git.py:\d+\): a leaf Variable .*; try --gradient_checkpointing false$"
    with pytest.raises(UserError, match=said), forward_told("somewhere"):
        policy.train()(input_ids=torch.arange(6, 30)[None])
    with pytest.raises(ValueError, match="ours"), forward_told("somewhere"):
        raise ValueError("ours")


def test_a_trained_part_without_a_gradient_is_one_line():
    """torch's own words, of a first step on two processes."""
    error = RuntimeError("Expected to have finished reduction in the prior iteration before starting a new one. …")
    with (
        pytest.raises(UserError, match=r"^somewhere: .* --ddp_find_unused_parameters true$"),
        forward_told("somewhere"),
    ):
        raise error


def test_a_model_without_gradient_checkpointing_keeps_its_activations():
    with torch.device("meta"):
        able, unable = (AutoModelForCausalLM.from_config(families.config(name, 300)) for name in ("llama", "ctrl"))
    assert [check_checkpointing(asked, able) for asked in (None, True, False)] == [True, True, False]
    assert [check_checkpointing(asked, unable) for asked in (None, False)] == [False, False]
    with pytest.raises(UserError, match="--gradient_checkpointing true: CTRLLMHeadModel has none"):
        check_checkpointing(True, unable)
