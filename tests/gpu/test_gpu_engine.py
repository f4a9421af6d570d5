"""The pair engine on a GPU: its kernels against float64, its forward against TRL's padded one, and its host waits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from tandem.engine import attention
from tandem.engine.forward import add_pair_forward
from tandem.engine.layout import lay_out_pairs
from tandem.engine.pairs import PairCollator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def batch(pairs: int, prompt: int, answer: int) -> dict[str, torch.Tensor]:
    """(2 · pairs, prompt + answer) rows of unequal lengths, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    columns = prompt + answer
    ids = torch.randint(5, 1000, (2 * pairs, columns), generator=generator)
    ids[pairs:, :prompt] = ids[:pairs, :prompt]
    ends = columns - torch.arange(2 * pairs) * 7 % (answer // 2)
    mask = (torch.arange(columns) < ends[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double().cpu() - exact.double().cpu()).norm() / exact.double().norm().cpu()).item()


@pytest.mark.parametrize(
    ("dtype", "backend", "shape"),
    [
        (torch.bfloat16, "varlen", {}),
        (torch.bfloat16, "varlen", {"kv": 8}),
        (torch.bfloat16, "varlen", {"window": 16}),
        (torch.bfloat16, "varlen", {"dim": 128}),
        (torch.bfloat16, "varlen", {"dim": 256}),
        (torch.float16, "varlen", {}),
        (torch.bfloat16, "auto", {"dim": 20}),
        (torch.float32, "sdpa", {}),
        (torch.float32, "auto", {"window": 16}),
        (torch.bfloat16, "dense", {"softcap": 5.0}),
    ],
)
def test_attention_and_its_gradients(dtype: torch.dtype, backend: Any, shape: dict[str, Any]):
    heads, kv, dim = 8, shape.get("kv", 2), shape.get("dim", 64)
    options = {name: shape[name] for name in ("window", "softcap") if name in shape}
    plan = lay_out_pairs(**batch(3, 70, 50))
    exact = [torch.randn(1, h, plan.n_tokens, dim, dtype=torch.float64).requires_grad_() for h in (heads, kv, kv)]
    reference = attention.PairAttention(plan, "dense")(*exact, **options)
    upstream = torch.randn_like(reference)
    reference.backward(upstream)
    ours = [tensor.detach().to("cuda", dtype).requires_grad_() for tensor in exact]
    output = attention.PairAttention(plan.to("cuda"), backend)(*ours, **options)
    output.backward(upstream.to("cuda", dtype))
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    assert error(output, reference) < limit
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None and error(one.grad, other.grad) < limit


def model(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).to("cuda", dtype).train()
    config, cls = {"gemma3": (Gemma3TextConfig, Gemma3ForCausalLM), "gemma2": (Gemma2Config, Gemma2ForCausalLM)}[kind]
    return cls(config(**shape, head_dim=64, sliding_window=32)).to("cuda", dtype).train()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_the_forward_is_trls(kind: str, dtype: torch.dtype, autocast: bool, tmp_path: Path):
    inputs = {name: tensor.cuda() for name, tensor in batch(4, 60, 40).items()}
    results, reports = [], []
    for ours in (False, True):
        trained = model(kind, dtype)
        trained.gradient_checkpointing_enable({"use_reentrant": False})
        if ours:
            add_pair_forward(trained, outputs=OUTPUTS, on_report=reports.append, cache_dir=tmp_path)
        else:
            add_fused_lm_head(trained, outputs=OUTPUTS)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            output = trained(**inputs, fused_lm_head=True, use_cache=False)
        output.log_probs.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trained.parameters()])
        results.append((output.log_probs.detach(), gradient))
    assert reports[0].layout == "shared", str(reports[0])
    limit = 1e-4 if dtype == torch.float32 and not autocast else 5e-2
    for theirs, mine in zip(*results, strict=True):
        assert error(mine, theirs) < limit


def test_a_micro_batch_does_not_wait(tmp_path: Path):
    """From a batch as the collator makes it, pinned, to the end of backward: nothing synchronises."""
    pairs = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [9, 10, 11]}] * 3
    trained = model("llama", torch.bfloat16)
    add_pair_forward(trained, outputs=OUTPUTS, cache_dir=tmp_path)

    def step(counted: bool) -> list[str]:
        made = PairCollator(0, None, layout="shared")(pairs)
        made.pop("pair_id")
        pinned = {name: value.pin_memory() for name, value in made.items()}
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if counted else "default")
            there = {name: value.to("cuda", non_blocking=True) for name, value in pinned.items()}
            labels = there["input_ids"].masked_fill(there.pop("completion_mask") == 0, -100)
            trained(**there, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum().backward()
            torch.cuda.set_sync_debug_mode("default")
        return [str(wait.message) for wait in waits]

    step(counted=False)  # which probes
    assert len(found := step(counted=True)) <= 1, found
