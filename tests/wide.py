"""Small models on which bfloat16 rounds as on those that people train: on `tests.tiny`'s it rounds to nothing.

They are 384 wide with weights of 0.08: measured there, the log-probs of two layouts differ by 1e-4 per token in
bfloat16, as SmolLM2's do.
"""

from pathlib import Path
from typing import Any

from tests import tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}


def save_model(folder: Path, kind: str = "llama", dtype: str = "bfloat16") -> Path:
    """A model folder with a tokenizer.

    Args:
        kind: `llama`, its head not tied, as Llama 3 70B's; or `gemma3`, the multimodal architecture of Gemma 3 4B to
            27B, with a window, a tied head and a vision tower that text does not reach.
    """
    import torch

    torch.manual_seed(0)
    text = tiny.tokenizer()
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (llama if kind == "llama" else gemma3)(len(text), ids).to(getattr(torch, dtype)).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def llama(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SHAPE, **ids))


def gemma3(vocabulary: int, ids: dict[str, int]) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    words = SHAPE | {"vocab_size": vocabulary, "head_dim": 64, "sliding_window": 24, "sliding_window_pattern": 2} | ids
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=words,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=vocabulary - 3,
        boi_token_index=vocabulary - 2,
        eoi_token_index=vocabulary - 1,
        initializer_range=SHAPE["initializer_range"],
        **ids,
    )
    return Gemma3ForConditionalGeneration(config)
