"""Log-probabilities of the completion tokens alone, from hidden states, in chunks.

A language-model head over M tokens and V words makes an (M, V) matrix, far larger than anything else in the step. Here
only one chunk of it exists at a time. For the backward: with a frozen head the forward makes the gradient at once; else
the chunk's probabilities are kept where they are few, and computed again where they are not.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from tandem.engine.layout import even_size

# Logits of one chunk: 96 MiB in float32. Measured on a CPU with a frozen head over 400 to 1,200 tokens: with half of it
# the head takes 7 to 15% longer, with half as much again up to 12% less.
CHUNK_LOGITS = 3 << 23
# In half precision each chunk also adds a whole weight gradient to the float32 sum
CHUNK_LOGITS_HALF = 1 << 25
# Logits that the passes after the product take at a time on the CPU. They and their probabilities fit into its caches,
# which takes a quarter less time than a whole chunk
PIECE_LOGITS = 3 << 19
# Words per product in float32 on the CPU. They fit into its caches, which is a fifth faster than the whole vocabulary
BLOCK_WORDS = 1024
# Probabilities kept from the forward to the backward of a trained head: 256 MiB, which for eight short pairs saves the
# fourth matrix product. Those that do not fit are computed again.
KEPT_PROBS = 1 << 26
# Fewer tokens than this make slow matrix products, however large the vocabulary
MIN_CHUNK_TOKENS = 64
# Words of one tile of TRL's kernel, as TRL itself calls it
_TRITON_TILE = 32768
# Devices that TRL has a Triton kernel for
TRITON_DEVICES = ("cuda", "xpu")

logger = logging.getLogger("tandem.engine")


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

    def chain_(self, gradient: Tensor, transformed: Tensor | None) -> Tensor:
        """Turn d/d(transformed) into d/d(logits), in place; `transformed` is what `apply_` returned.

        It may be None where there is no softcap.
        """
        if self.softcap is not None:
            assert transformed is not None
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
        if hidden.device.type in TRITON_DEVICES and not triton_fault(hidden.device):
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
            # Within an autograd function gradients always look disabled
            scores = _ScoreTokens.apply(hidden, weight, bias, targets, transform, outputs, torch.is_grad_enabled())
    return TokenScores(*scores)


@functools.cache
def triton_fault(device: torch.device) -> str:
    """Why TRL's kernel does not run on `device`, found by running it; empty where it does.

    Triton builds a launcher on its first use, which takes a C compiler and Python's headers: slim images have neither.
    """
    hidden, weight = torch.zeros(1, 16, device=device), torch.zeros(16, 16, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, _TRITON_TILE, None, 1.0, ("log_probs",))
    except Exception as error:  # a compiler's failures are of every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "log-probs are computed without Triton, which is slower, because its kernel fails: %s; Triton needs a C "
            "compiler and Python's headers (Debian: apt-get install gcc python3-dev)",
            reason,
        )
        return reason
    return ""


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
        differentiable: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = Head(weight, bias, transform, dtype, targets.numel())
        trained = differentiable and any(ctx.needs_input_grad[1:3])
        kept = hidden.new_empty(head.tokens_to_keep() if trained else 0, weight.shape[0], dtype=torch.float32)
        # With a frozen head the backward needs only d log p / d hidden, which is made while the probabilities are here
        frozen = differentiable and not trained and ctx.needs_input_grad[0]
        jacobian = torch.empty_like(hidden, dtype=dtype) if frozen else None

        scores = []
        # All that is kept is one product; in half precision, that would be a matrix beside it first
        for rows in head.chunks(len(kept) if dtype == torch.float32 else 0):
            logits, probs = head.logits(hidden[rows].to(dtype), kept[rows])
            scores += [_score(*piece, outputs=outputs) for piece in head.pieces(logits, probs, targets[rows])]
            if jacobian is not None:
                upstream = torch.ones_like(targets[rows], dtype=torch.float32)
                jacobian[rows] = head.grad_logits(logits, probs, targets[rows], upstream) @ head.weight

        ctx.dtype, ctx.transform = dtype, transform
        ctx.spent = False
        ctx.save_for_backward(hidden, weight, bias, targets, kept, jacobian)
        result = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}
        log_probs, *others = (result.get(field) for field in TokenScores.__dataclass_fields__)
        ctx.mark_non_differentiable(*(other for other in others if other is not None))
        ctx.set_materialize_grads(False)
        return log_probs, *others  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept, jacobian = ctx.saved_tensors
        if grad_log_probs is None:
            return (None,) * 7
        if jacobian is not None:
            return (jacobian.float() * grad_log_probs[:, None]).to(hidden.dtype), *(None,) * 6
        # The gradient takes the place of the kept probabilities. Autograd must not see it, or would refuse a second
        # backward, which computes them again
        kept, ctx.spent = kept.data[: 0 if ctx.spent else len(kept)], True
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight, bias):
            head = Head(weight, bias, ctx.transform, ctx.dtype, targets.numel())
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
            for rows in head.chunks(len(kept)):
                states = hidden[rows].to(ctx.dtype)
                logits, probs = None, kept[rows]
                if rows.start >= len(kept):
                    logits, probs = head.logits(states, probs)
                    for piece in head.pieces(logits, probs):
                        _softmax(*piece)
                grad_logits = head.grad_logits(logits, probs, targets[rows], grad_log_probs[rows].float())
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0, dtype=torch.float32)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ head.weight
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.t(), states, first=rows.start == 0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


class Head:
    """A head of (V, D) weights over chunks of some tokens. The chunks share their memory: to touch fresh memory costs
    more than a pass over it."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, transform: LogitTransform, dtype: torch.dtype, tokens: int
    ) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.transform = transform
        self.tokens = tokens
        vocabulary = weight.shape[0]
        logits = CHUNK_LOGITS if dtype == torch.float32 else CHUNK_LOGITS_HALF
        # Even chunks: each reads all weights, and a short last one would read them for a few tokens
        self.chunk_tokens = even_size(tokens, max(MIN_CHUNK_TOKENS, logits // vocabulary))
        self._logits = weight.new_empty(min(self.chunk_tokens, tokens), vocabulary, dtype=torch.float32)
        # The derivative of soft-capping takes the logits themselves; else the probabilities take their place
        self._probs = self._logits if transform.softcap is None else torch.empty_like(self._logits)

    def chunks(self, first: int = 0) -> Iterator[slice]:
        """Consecutive tokens, after the `first` ones as one chunk. Without any token, one chunk of none."""
        if first:
            yield slice(0, first)
        for start in range(first, max(1, self.tokens), self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, self.tokens))

    def pieces(self, *chunk: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A chunk's tensors, some tokens of each at a time."""
        limit = PIECE_LOGITS // len(self.weight) if self._logits.device.type == "cpu" else self.chunk_tokens
        return zip(*(tensor.split(even_size(self.chunk_tokens, max(1, limit))) for tensor in chunk), strict=True)

    def tokens_to_keep(self) -> int:
        """Of how many tokens the probabilities fit into what may be kept, in whole chunks."""
        if self.transform.softcap is not None:  # whose derivative takes the logits themselves
            return 0
        fitting = KEPT_PROBS // self.weight.shape[0]
        return self.tokens if self.tokens <= fitting else fitting - fitting % self.chunk_tokens

    def logits(self, states: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(chunk, V) transformed logits, float32, and the memory for their probabilities, which may be the same.

        It is `kept` where that is not empty; otherwise chunks share it. The product is in the states' dtype.
        """
        rows = len(states)
        logits, probs = (kept, kept) if len(kept) else (self._logits[:rows], self._probs[:rows])
        return self.transform.apply_(self._product(states, logits)), probs

    def _product(self, states: Tensor, out: Tensor) -> Tensor:
        """(chunk, V) float32: the states times the weights, plus the bias."""
        if states.dtype != out.dtype:
            return out.copy_(F.linear(states, self.weight, self.bias))
        block = BLOCK_WORDS if states.device.type == "cpu" else len(self.weight)
        for start in range(0, len(self.weight), block):
            words = slice(start, start + block)
            if self.bias is None:
                torch.mm(states, self.weight[words].t(), out=out[:, words])
            else:
                torch.addmm(self.bias[words], states, self.weight[words].t(), out=out[:, words])
        return out

    def grad_logits(self, logits: Tensor | None, probs: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
        """(chunk, V) gradient of sum(upstream * log p(target)) by the logits before their transform.

        It takes the place of the probabilities.
        """
        # d log p(target) / d logit_j = [j = target] - p_j
        gradient = probs.mul_(-upstream[:, None])
        gradient.scatter_add_(-1, targets[:, None], upstream[:, None])
        return self.transform.chain_(gradient, logits).to(self.weight.dtype)


def _score(logits: Tensor, probs: Tensor, targets: Tensor, *, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Fields of `TokenScores` from (n, V) transformed logits, whose softmax it writes into `probs`, even over them."""
    powers, total, log_sum_exp = _powers(logits)
    scores = {"log_probs": logits.gather(-1, targets[:, None]).squeeze(-1) - log_sum_exp}
    if "mean_logits" in outputs:
        scores["mean_logits"] = logits.mean(-1)
    if "is_top1" in outputs:
        scores["is_top1"] = logits.argmax(-1) == targets
    if "entropy" in outputs:
        scores["entropy"] = log_sum_exp - torch.linalg.vecdot(powers, logits) / total.squeeze(-1)
    if "log_sum_sq_probs" in outputs:
        scores["log_sum_sq_probs"] = torch.linalg.vecdot(powers, powers).log() - 2 * total.squeeze(-1).log()
    torch.div(powers, total, out=probs)
    return scores


def _softmax(logits: Tensor, out: Tensor) -> None:
    powers, total, _ = _powers(logits)
    torch.div(powers, total, out=out)


def _powers(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, V) exp(logit - the largest), their (n, 1) sums, and (n,) log-sum-exp.

    Not torch's softmax and logsumexp, which would each do half of this again, nor its softmax or log_softmax alone,
    whose sums over a large vocabulary are biased by up to 3e-6.
    """
    largest = logits.amax(-1, keepdim=True)
    powers = (logits - largest).exp_()
    total = powers.sum(-1, keepdim=True)
    return powers, total, (largest + total.log()).squeeze(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right in float32, or total = left @ right where it holds nothing yet."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right
