"""One adapter of every type of PEFT that trains a causal language model as tiny as those of these tests."""

from pathlib import Path
from typing import Any

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
LORA = ATTENTION | {"r": 4, "lora_alpha": 16}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LORA", LORA),
    "rslora": ("LORA", LORA | {"use_rslora": True}),
    "dora": ("LORA", LORA | {"use_dora": True}),
    "patterns": ("LORA", LORA | {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}}),
    "lora_bias": ("LORA", LORA | {"lora_bias": True}),
    "bias": ("LORA", LORA | {"bias": "all"}),
    "pissa": ("LORA", LORA | {"init_lora_weights": "pissa"}),
    "olora": ("LORA", LORA | {"init_lora_weights": "olora"}),
    "embeddings": ("LORA", LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "saved_modules": ("LORA", LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved_norm": ("LORA", LORA | {"modules_to_save": ["norm"]}),
    "lora_tokens": ("LORA", LORA | {"trainable_token_indices": [5, 6, 30]}),
    "tokens": ("TRAINABLE_TOKENS", {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 30]}),
    "adalora": ("ADALORA", ATTENTION | {"total_step": 10}),
    "boft": ("BOFT", ATTENTION | {"boft_block_size": 8}),
    "c3a": ("C3A", ATTENTION | {"block_size": 8}),
    "delora": ("DELORA", ATTENTION),
    "fourierft": ("FOURIERFT", ATTENTION | {"n_frequency": 50}),
    "gralora": ("GRALORA", ATTENTION | {"r": 8}),
    "hira": ("HIRA", ATTENTION),
    "hra": ("HRA", ATTENTION),
    "ia3": ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln_tuning": ("LN_TUNING", {"target_modules": ["input_layernorm"]}),
    "loha": ("LOHA", ATTENTION),
    "lokr": ("LOKR", ATTENTION),
    "miss": ("MISS", ATTENTION | {"r": 8}),
    "oft": ("OFT", ATTENTION | {"oft_block_size": 8}),
    "osf": ("OSF", ATTENTION),
    "peanut": ("PEANUT", ATTENTION),
    "psoft": ("PSOFT", ATTENTION | {"r": 8}),
    "pvera": ("PVERA", ATTENTION),
    "randlora": ("RANDLORA", ATTENTION),
    "road": ("ROAD", ATTENTION | {"group_size": 8}),
    "shira": ("SHIRA", ATTENTION | {"r": 4}),
    "supertuning": ("SUPERTUNING", ATTENTION),
    "tinylora": ("TINYLORA", ATTENTION),
    "unilora": ("UNILORA", ATTENTION),
    "vblora": ("VBLORA", ATTENTION | {"vector_length": 8, "num_vectors": 16}),
    "vera": ("VERA", ATTENTION),
    "waveft": ("WAVEFT", ATTENTION | {"n_frequency": 50}),
}
"""PEFT's name of the type, and the settings of its configuration."""


def config_of(kind: str, **changes: Any) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name, settings = KINDS[kind]
    configs = {str(key.value): config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return configs[name](**{"task_type": "CAUSAL_LM"} | settings | changes)


def save_kind(folder: Path, model: Path, kind: str, seed: int = 0, std: float = 0.05, **changes: Any) -> Path:
    """An adapter of that kind on `model`, moved away from its start, with a tokenizer beside it."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config_of(kind, **changes))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += std * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
