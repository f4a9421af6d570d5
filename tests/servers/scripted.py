"""A model that is a judge by its weights: whatever it is asked, it says one of three verdicts and stops.

Its layers add nothing to the embeddings, so that the next token depends on the last one alone. As a folder for
transformers and vLLM, and as a GGUF file for llama.cpp (written by the package gguf, in the server's environment:
`python -m tests.servers.scripted FILE`).
"""

import sys
from pathlib import Path
from typing import Any

# Each a token, of at most 32 bytes, which is what llama-cpp-python makes room for
OPENING = '{"rationale": "As I see it.", '
ENDINGS = [f'"verdict": "{word}"}}' for word in ("A", "B", "tie")]
VERDICTS = [OPENING + ending for ending in ENDINGS]
LOGITS = (40.0, 39.5, 38.0)  # of the endings, after the opening; all else has 0
SPECIALS = ("<unk>", "<s>", "</s>")
HIDDEN, HEADS, WIDE, CONTEXT = 64, 1, 64, 32768
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def embeddings(count: int) -> tuple[Any, Any]:
    """Input and output embeddings, (count, HIDDEN) each, of a vocabulary that ends with the opening and the endings.

    Direction 1 leads from the opening to the endings, 2 from these to the end, and 0 from all else to the opening.
    """
    import numpy as np

    endings, opening, end = slice(count - len(ENDINGS), count), count - len(ENDINGS) - 1, SPECIALS.index("</s>")
    come, go = np.zeros((2, count, HIDDEN), dtype=np.float32)
    come[:opening, 0] = come[opening, 1] = come[endings, 2] = 1
    go[opening, 0] = go[end, 2] = LOGITS[0]
    go[endings, 1] = LOGITS
    return come, go / np.float32(HIDDEN**0.5)  # the final norm makes a vector of that length of a unit vector


def save_model(folder: Path) -> Path:
    """As a folder with weights and tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_tokens([OPENING, *ENDINGS])
    text = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(text),
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    come, go = embeddings(len(text))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(come))
        model.lm_head.weight.copy_(torch.from_numpy(go))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def save_gguf(file: Path) -> None:
    """As a GGUF file, with a vocabulary of bytes and verdicts."""
    import gguf
    import numpy as np

    kinds = gguf.TokenType
    tokens = [
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(text.replace(" ", "▁") for text in [OPENING, *ENDINGS]),
    ]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256, *[kinds.NORMAL] * (1 + len(ENDINGS))]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    come, go = embeddings(len(tokens))
    square, wide = np.zeros((HIDDEN, HIDDEN), np.float32), np.zeros((WIDE, HIDDEN), np.float32)
    tensors = {"token_embd": come, "output": go, "output_norm": np.ones(HIDDEN, np.float32)}
    tensors |= {f"blk.0.{name}_norm": np.ones(HIDDEN, np.float32) for name in ("attn", "ffn")}
    tensors |= {f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}
    tensors |= {"blk.0.ffn_gate": wide, "blk.0.ffn_up": wide, "blk.0.ffn_down": wide.T.copy()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    save_gguf(Path(sys.argv[1]))
