"""A tiny random model of every causal language model that the installed transformers knows.

A configuration is the class's own, each of its sizes replaced by a small one; `OWN` says what that rule alone does not
find, and `NOT_TINY` what cannot be built so, with the reason.
"""

import inspect
from pathlib import Path
from typing import Any

from tests import tiny

WIDTH, LAYERS, HEADS, GROUPS, EXPERTS = 64, 2, 4, 2, 4
_HEAD = WIDTH // HEADS

# The small size of each setting, by its name. Lists of layers are left out: the class makes its own for two layers
_SIZES: list[tuple[int, str]] = [
    (
        WIDTH,
        """
        hidden_size d_model n_embd dim_model embedding_size embedding_dim emb_dim word_embed_proj_dim lru_width
        input_embedding_size output_embedding_size attention_hidden_size projector_input_dim projector_output_dim
        hidden_size_global out_hidden_size backbone_hidden_size pronunciation_embed_dim shape_embed_dim mamba_d_ssm""",
    ),
    (
        96,
        """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size feed_forward_size
        n_inner mlp_dim intermediate_size_mlp dense_intermediate_size""",
    ),
    (
        32,
        """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size image_size
        sliding_window attention_window_size local_attention sliding_window_size""",
    ),
    (
        LAYERS,
        """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_blocks depth conf_num_hidden_layers
        num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts
        pad_token_id eos_token_id sep_token_id""",
    ),
    (
        HEADS,
        """
        num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads attention_heads num_heads
        num_encoder_attention_heads num_decoder_attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads
        linear_num_heads swa_num_attention_heads
        num_experts n_routed_experts num_local_experts moe_num_experts mamba_dt_rank time_step_rank""",
    ),
    (
        GROUPS,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups index_n_heads
        num_global_key_value_heads""",
    ),
    (
        WIDTH // HEADS,
        """
        head_dim swa_head_dim global_head_dim attention_head_dim v_head_dim kv_channels linear_key_head_dim
        linear_value_head_dim linear_head_dim index_head_dim d_head dim_head attention_head_size mamba_d_head
        mamba_head_dim mamba_headdim qk_head_dim kv_lora_rank q_lora_rank hidden_size_per_layer_input mamba_chunk_size
        chunk_size""",
    ),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_d_state state_size ssm_state_size patch_size"),
    (
        1,
        """
        n_group topk_group num_expert_group n_expert_groups n_groups mamba_n_groups bos_token_id cls_token_id
        decoder_start_token_id""",
    ),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
]
_SMALL = {name: size for size, names in _SIZES for name in names.split()}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXED = {"num_key_value_heads": HEADS, "qk_head_dim": 16, "head_dim": 8, "v_head_dim": 16, "index_topk": 16}
_SPARSE = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "num_heads": 8}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "axk2": _INDEXED,
    "bailing_hybrid": _LINEAR,
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "patcher_config": {"hidden_size": WIDTH, "intermediate_size": 96},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm_moe_dsa": _INDEXED,
    "got_ocr2": {"vision_config": {"output_channels": 16, "mlp_dim": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["full_attention", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 1, "head_dim": 8, "num_key_value_heads": HEADS, "num_layers": 1},
    "mamba2": _MAMBA2 | {"head_dim": 16},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "moshi": {"audio_vocab_size": 32},
    "phimoe": {"sliding_window": None},  # which no packed row keeps; it shows in the plan's float32 alone
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": {"text_config": _LINEAR | _SPARSE},
    "qwen4_exp_text": _LINEAR | _SPARSE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
    },
    "rwkv": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 64, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * _HEAD,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
NOT_TINY: dict[str, str] = {
    "dbrx": "the configuration of its attention has lost rope_theta, which its model reads (transformers 5.23)",
    "gemma3n": "its towers need timm",
    "gemma4_assistant": "it drafts for another model, whose keys and values all of its layers read",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values all of its layers read",
    "musicgen": "its class takes the configuration of its decoder, which draws sound",
    "musicgen_melody": "its class takes the configuration of its decoder, which draws sound",
}


def names() -> list[str]:
    """transformers' names of all types of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(name: str, vocabulary: int) -> Any:
    """The tiny configuration of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    return kind(**_small(kind, vocabulary, OWN.get(name, {})))


def _small(kind: Any, vocabulary: int, own: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    words = {"vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"}
    for name in inspect.signature(kind.__init__).parameters:
        if name in words:
            settings[name] = vocabulary
        elif name in _SMALL:
            settings[name] = _SMALL[name]
    if "kv_lora_rank" in settings:  # latent attention has no groups of heads
        settings["num_key_value_heads"] = HEADS
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if getattr(inner, "model_type", None):
            settings[name] = _small(inner, vocabulary, own.get(name, {}))
        elif (usual := getattr(kind(), name, None)) is not None:  # of any type
            small = _small(type(usual), vocabulary, own.get(name, {}))
            settings[name] = {"model_type": usual.model_type} | small
    return settings | {key: value for key, value in own.items() if key not in getattr(kind, "sub_configs", {})}


def save(name: str, folder: Path, dtype: str = "float32") -> Path:
    """A model folder of a type, with the tokenizer of `tests.tiny`; of images and text too, if it is in no table of
    causal language models."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = tiny.tokenizer()
    kind = AutoModelForCausalLM if name in names() else AutoModelForImageTextToText
    model = kind.from_config(config(name, len(text)), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder
