"""A step as a GPU takes it, through the varlen kernel and TRL's head, on tensors without values.

Tensors on the meta device have shapes and types: what a kernel's signature refuses, or an operation that would need a
value, fails here too.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tandem.engine import attention, kernels, logprobs
from tandem.engine.forward import forward_laid_out
from tandem.engine.layout import lay_out_pairs

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
SHAPE: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
PAIRS, COLUMNS, PROMPT = 3, 40, 25


def model(kind: str) -> Any:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    with torch.device("meta"):
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**SHAPE, **heads))
        windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
        return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **heads, head_dim=256, **windows))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", ["all weights", "an adapter"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_all_that_is_trained_gets_a_gradient(
    monkeypatch: pytest.MonkeyPatch, kind: str, trained: str, checkpointing: bool
):
    calls = []
    kernel = kernels.torch_varlen

    def watched(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, *sizes: int, **options: Any) -> Any:
        calls.append((query.dtype, query.shape, key.shape, cu_seq_q.dtype, sizes, options["window_size"]))
        return kernel(query, key, value, cu_seq_q, cu_seq_k, *sizes, **options)

    monkeypatch.setattr(kernels, "torch_varlen", watched)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "varlen")
    monkeypatch.setattr(logprobs, "TRITON_DEVICES", ("meta",))
    monkeypatch.setattr(logprobs, "triton_fault", lambda _: "")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    ids = torch.arange(2 * PAIRS * COLUMNS).view(2 * PAIRS, COLUMNS) % 900
    ids[PAIRS:, :PROMPT] = ids[:PAIRS, :PROMPT]
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    places = lay_out_pairs(ids, torch.ones_like(ids), labels)

    whole = model(kind).to(torch.bfloat16).train()
    if trained == "an adapter":
        adapted = get_peft_model(
            whole, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), low_cpu_mem_usage=True
        )
        assert all(parameter.is_meta for parameter in adapted.parameters())
        whole.enable_input_require_grads()
    if checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    output = forward_laid_out(whole, places.to("meta"), ids.to("meta"), labels.to("meta"), OUTPUTS)
    assert output.log_probs.shape == (2 * PAIRS, COLUMNS - 1) and output.log_probs.dtype == torch.float32
    output.log_probs.sum().backward()

    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
            assert parameter.grad.dtype == parameter.dtype, name
    queries, size = PAIRS * (2 * COLUMNS - PROMPT), whole.config.head_dim or 8
    assert len(calls) == 4 * (1 + checkpointing)
    for index, (dtype, query, key, ends, sizes, window) in enumerate(calls[:4]):
        windowed = kind == "gemma3" and index % 2 == 0
        assert dtype == torch.bfloat16 and ends == torch.int32
        assert (query, key) == ((queries, 8, size), (2 * PAIRS * COLUMNS, 2, size))
        assert sizes == (COLUMNS, COLUMNS)
        assert window == ((15, 0) if windowed else (-1, 0))
