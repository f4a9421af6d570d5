"""Random models of real architectures, two layers and 32 wide, and pairs for them."""

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 128
PAD = 0
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _BASE | {"num_key_value_heads": 2}
# Shorter than every sequence of the tests
_WINDOW = {"sliding_window": 7}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CONFIGS = {
    "Llama": (transformers.LlamaConfig, _GQA | {"tie_word_embeddings": True}),
    "Gemma2": (transformers.Gemma2Config, _GQA | _WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 12}),
    "Gemma3": (
        transformers.Gemma3TextConfig,
        _GQA
        | _WINDOW
        | {"head_dim": 8, "query_pre_attn_scalar": 12}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Mistral": (transformers.MistralConfig, _GQA | _WINDOW),
    "Qwen2": (transformers.Qwen2Config, _GQA),
    "Qwen3": (transformers.Qwen3Config, _GQA | {"head_dim": 8}),
    "SmolLM3": (transformers.SmolLM3Config, _GQA | {"no_rope_layers": [1, 0]}),
    "Olmo2": (transformers.Olmo2Config, _GQA),
    "GPT2": (transformers.GPT2Config, _GPT2),
    "GPTNeoX": (transformers.GPTNeoXConfig, _BASE),
    "Phi": (transformers.PhiConfig, _BASE),
    "Phi3": (transformers.Phi3Config, _GQA),
    "Granite": (transformers.GraniteConfig, _GQA | {"logits_scaling": 4.0, "attention_multiplier": 0.3}),
    "Mixtral": (transformers.MixtralConfig, _GQA | {"num_local_experts": 4}),
    "Qwen2Moe": (transformers.Qwen2MoeConfig, _GQA | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3Moe": (transformers.Qwen3MoeConfig, _GQA | _EXPERTS | {"head_dim": 8}),
    "Cohere2": (transformers.Cohere2Config, _GQA | _WINDOW | {"logit_scale": 0.25}),
    "GptOss": (transformers.GptOssConfig, _GQA | _WINDOW | {"head_dim": 8, "num_local_experts": 4}),
    # dropout: stock TRL, which these are compared to, leaves it on where it is a function call
    "OPT": (transformers.OPTConfig, _BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "Bloom": (
        transformers.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "FalconH1": (
        transformers.FalconH1Config,
        _GQA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16},
    ),
}


def tiny_model(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model in eval mode, its matrices drawn wide enough for attention to matter."""
    config_class, settings = CONFIGS[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(settings | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def perturbed(model: PreTrainedModel, seed: int = 1, size: float = 0.02) -> PreTrainedModel:
    """The same model with noise on its weights, in place: a policy that has left its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def random_pairs(count: int, seed: int = 0, longest: int = 24) -> list[dict[str, list[int]]]:
    """Token ids of pairs as TRL prepares them. Chosen and rejected begin with different tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int, first: int | None = None) -> list[int]:
        drawn = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        return drawn if first is None else [first, *drawn[1:]]

    def length() -> int:
        return int(torch.randint(1, longest, (), generator=generator))

    return [
        {"prompt_ids": ids(length()), "chosen_ids": ids(length(), 3), "rejected_ids": ids(length(), 4)}
        for _ in range(count)
    ]


def collate(pairs: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, (2B, S) int64: all chosen rows, then all rejected ones."""
    rows = [(pair["prompt_ids"], pair[answer]) for answer in ("chosen_ids", "rejected_ids") for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)

    def pad(row: list[int], value: int) -> list[int]:
        padding = [value] * (width - len(row))
        return row + padding if side == "right" else padding + row

    return {
        "input_ids": torch.tensor([pad(prompt + answer, PAD) for prompt, answer in rows]),
        "attention_mask": torch.tensor([pad([1] * len(prompt + answer), 0) for prompt, answer in rows]),
        "labels": torch.tensor([pad([-100] * len(prompt) + answer, -100) for prompt, answer in rows]),
    }
