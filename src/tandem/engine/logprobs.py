"""Log-probabilities of the completion tokens alone, from hidden states, in chunks.

A language-model head over M tokens and V words makes an (M, V) matrix, far larger than anything else in the step.
Here it exists one chunk of tokens at a time, in the forward and again in the backward, which recomputes it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

# Logits of one chunk: 32 MiB in float32. Measured on CPU: half of it slows the head by a fifth, twice it gains nothing.
# Four times as many in half precision, where each chunk also adds a whole weight gradient to the float32 sum.
_CHUNK_LOGITS = 1 << 23
# Fewer tokens than this make slow matrix products, however large the vocabulary
_MIN_CHUNK_TOKENS = 64
# Words of one tile of TRL's kernel, as TRL itself calls it
_TRITON_TILE = 32768


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits before the softmax: `softcap * tanh(scale * x / softcap) / temperature`.

    Attributes:
        scale: factor on the head's output.
        softcap: bound of the soft-capping (Gemma 2, arXiv 2408.00118), None for none.
        temperature: divisor of the result.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, config: PreTrainedConfig, temperature: float = 1.0) -> "LogitTransform":
        """Read it from a text config the way TRL 1.16's `add_fused_lm_head` does."""
        names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
        scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        divisor = getattr(config, "logits_scaling", None)
        if scale is None and divisor is not None:
            # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by
            scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(1.0 if scale is None else scale, softcap, temperature)

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform float32 logits in place."""
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return logits if factor == 1.0 else logits.mul_(factor)

    def chain_(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """Turn d/d(transformed) into d/d(logits), in place; `transformed` is what `apply_` returned."""
        if self.softcap is not None:
            # tanh(scale * x / softcap), and its derivative 1 - tanh^2
            tanh = transformed * (self.temperature / self.softcap)
            gradient.mul_(1 - tanh * tanh)
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)


@dataclass(frozen=True)
class TokenScores:
    """(M,) scores of M tokens, float32; a field that was not asked for is None. Only `log_probs` has a gradient.

    Attributes:
        log_probs: log p of the token.
        entropy: entropy of the distribution it was drawn from, in nats.
        log_sum_sq_probs: log of the sum of that distribution's squared probabilities (WPO, arXiv 2406.11827, eq. 2).
        mean_logits: mean over the vocabulary of the transformed logits.
        is_top1: bool, whether the token is the first of the most likely ones.
    """

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    outputs: tuple[str, ...] = ("log_probs",),
) -> TokenScores:
    """Score `targets` under softmax(transform(hidden @ weight.T + bias)).

    The product runs in autocast's dtype, or hidden's; everything after it in float32.

    Args:
        hidden: (M, D) states that predict the targets; M may be 0.
        weight, bias: (V, D) and (V,) of the head. FSDP2 (DTensor) and ZeRO-3 shards are gathered once.
        targets: (M,) int64.
        transform: from the head's output to logits.
        outputs: the fields of `TokenScores` to compute; `log_probs` always is.
    """
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = bias.full_tensor() if isinstance(bias, DTensor) else bias
    with maybe_gather_lm_head_ctx(weight, bias):
        if hidden.device.type in ("cuda", "xpu"):
            scores = ChunkedLogProbFunction.apply(
                hidden,
                weight,
                bias,
                targets,
                transform.temperature,
                _TRITON_TILE,
                transform.softcap,
                transform.scale,
                outputs,
            )
        else:
            scores = _ScoreTokens.apply(hidden, weight, bias, targets, transform, outputs)
    return TokenScores(*scores)


class _ScoreTokens(torch.autograd.Function):
    """`score_tokens` without Triton.

    TRL's function has a path for this too. It folds tiles in about twelve passes over each tile, and under bf16 does
    its gradient products in float32, which on a CPU costs four times the bf16 ones. This one goes through a chunk of
    logits with a few fused torch kernels. A chunk holds the whole vocabulary, so that the gradient of a hidden state
    is rounded once, after one product, and the gradient of the weight is summed over chunks in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.dtype, ctx.transform = dtype, transform
        ctx.save_for_backward(hidden, weight, bias, targets)

        tokens = targets.numel()
        result = {name: hidden.new_empty(tokens, dtype=torch.float32) for name in ("log_probs", *outputs)}
        if "is_top1" in outputs:
            result["is_top1"] = torch.empty_like(targets, dtype=torch.bool)
        head = weight.to(dtype)
        for rows in _chunks(tokens, weight.shape[0], dtype):
            logits = _logits(hidden[rows].to(dtype), head, bias, transform)
            target = targets[rows]
            log_sum_exp = logits.logsumexp(-1)
            result["log_probs"][rows] = logits.gather(-1, target[:, None]).squeeze(-1) - log_sum_exp
            if "mean_logits" in outputs:
                result["mean_logits"][rows] = logits.mean(-1)
            if "is_top1" in outputs:
                result["is_top1"][rows] = logits.argmax(-1) == target
            if "entropy" in outputs or "log_sum_sq_probs" in outputs:
                probs = logits.softmax(-1)
                if "entropy" in outputs:
                    result["entropy"][rows] = log_sum_exp - torch.linalg.vecdot(probs, logits)
                if "log_sum_sq_probs" in outputs:
                    result["log_sum_sq_probs"][rows] = torch.linalg.vecdot(probs, probs).log()

        log_probs, *others = (result.get(field) for field in TokenScores.__dataclass_fields__)
        ctx.mark_non_differentiable(*(other for other in others if other is not None))
        ctx.set_materialize_grads(False)
        return log_probs, *others  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_log_probs is None:
            return (None,) * 6
        dtype, transform = ctx.dtype, ctx.transform
        with maybe_gather_lm_head_ctx(weight, bias):
            head = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
            for rows in _chunks(targets.numel(), weight.shape[0], dtype):
                states = hidden[rows].to(dtype)
                logits = _logits(states, head, bias, transform)
                # d log p(target) / d logit_j = [j = target] - p_j
                upstream = grad_log_probs[rows].float()
                grad_logits = logits.softmax(-1).mul_(-upstream[:, None])
                grad_logits.scatter_add_(-1, targets[rows, None], upstream[:, None])
                grad_logits = transform.chain_(grad_logits, logits)
                del logits
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ head
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), states)
                elif grad_weight is not None:
                    grad_weight += grad_logits.t() @ states
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(tokens: int, vocabulary: int, dtype: torch.dtype) -> Iterator[slice]:
    logits = _CHUNK_LOGITS if dtype == torch.float32 else 4 * _CHUNK_LOGITS
    size = max(_MIN_CHUNK_TOKENS, logits // vocabulary)
    for start in range(0, tokens, size):
        yield slice(start, start + size)


def _logits(states: Tensor, head: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """(chunk, V) transformed logits, float32, from a product in the states' dtype."""
    product = states @ head.t() if bias is None else torch.addmm(bias.to(head.dtype), states, head.t())
    return transform.apply_(product.float())
