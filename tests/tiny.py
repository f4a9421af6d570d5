"""A tiny random model with a working tokenizer, and a tiny preference file: real parts, milliseconds to run."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = "the cat sat on a mat and the dog ran far away from red house why did you eat my green apple".split()  # noqa: SIM905


def tokenizer(chat_template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: index for index, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=chat_template,
    )


def save_model(
    folder: Path,
    seed: int = 0,
    chat_template: str | None = TEMPLATE,
    dtype: str = "float32",
    tied: bool = True,
) -> Path:
    """A 2-layer Llama with its tokenizer, as a model folder; with a tied head it repeats the last token for ever."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    text = tokenizer(chat_template)
    config = LlamaConfig(
        vocab_size=len(text),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def uneven_rows(count: int) -> list[dict[str, str]]:
    """`hh_rows` whose chosen answers are up to 82 words longer, each another number of them."""
    rows = hh_rows(count)
    for index, row in enumerate(rows):
        row["chosen"] += " far" * (index * index % 83)
    return rows


def hh_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """HH transcripts of a few words, each prompt different."""
    rows = []
    for index in range(start, start + count):
        word = WORDS[index % len(WORDS)]
        prompt = f"\n\nHuman: {index} say {word}\n\nAssistant:"
        if index % 3 == 0:
            prompt = f"\n\nHuman: hi {index}\n\nAssistant: hello\n\nHuman: say {word}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {word} {word}", "rejected": f"{prompt} no, {index} is better"})
    return rows


def save_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_adapter(folder: Path, model: Path, seed: int = 0, std: float = 0.1) -> Path:
    """A LoRA adapter on every linear layer of `model`, its B not zero: it changes the answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    adapted.save_pretrained(folder)
    return folder
