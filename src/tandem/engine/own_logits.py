"""Models whose logits are more than their head's product with their last states.

TRL's fused forward, and the pair engine, multiply the states by the head's weights and scale or cap the product as the
configuration says under a few names. A model may do something else before its head (BERT, ModernBERT) or after it
(xLSTM, RecurrentGemma): its log-probs would be those of another model.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.engine.backbone import backbone
from tandem.engine.logprobs import LogitTransform
from tandem.engine.modes import evaluating
from tandem.engine.precision import same_autocast

REASON = "its logits are not those that its head makes of its last states, so they are taken whole"
# Of the largest number: a product that is rounded to bfloat16 twice, and less than any cap or scale that matters
_ALIKE = 0.02
# The head's output that is put in its place: a cap shows at large ones
_LARGE = 40.0
_TOKENS = 32


def made_by_head(
    model: PreTrainedModel, own_forward: Callable[..., Any], input_ids: Tensor, transform: LogitTransform
) -> bool:
    """Whether the logits of `own_forward` are `transform` of what the head makes of the backbone's last states.

    The head's input is compared with those states. Its output is replaced by numbers up to 40, and the model's logits
    are compared with `transform` of these. Collective if the model is sharded.

    Args:
        own_forward: the model's, which returns `logits`.
        input_ids: (B, S) int64, of which a few tokens are taken.
        transform: without a temperature.
    """
    rows = input_ids[:2, :_TOKENS]
    states: list[Tensor] = []
    entered: list[Tensor] = []
    numbers: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        states.append(getattr(output, "last_hidden_state", output[0]))

    def replace(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        entered.append(inputs[0])
        ramp = torch.linspace(-_LARGE, _LARGE, output.numel(), dtype=output.dtype, device=output.device)
        numbers.append(ramp.float().view_as(output))
        return ramp.view_as(output)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(backbone(model).register_forward_hook(note))
        hooks.enter_context(model.get_output_embeddings().register_forward_hook(replace))
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(evaluating(model))
        hooks.enter_context(same_autocast(input_ids.device.type))
        logits = own_forward(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    if not (len(states) == len(entered) == 1):  # whatever it does, it does not show
        return True
    return _alike(entered[0], states[0]) and _alike(logits, transform.apply_(numbers[0]))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    gap = (one.float() - other.float().to(one.device)).abs().max()
    return bool(gap <= _ALIKE * other.float().abs().max())


def scores_of(logits: Tensor, targets: Tensor, temperature: float, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Fields of `logprobs.TokenScores` of (B, S) `targets` under (B, S, V) `logits`; the last has a gradient alone."""
    logits = logits.float() / temperature
    all_log_probs = logits.log_softmax(-1)
    scores = {"log_probs": all_log_probs.gather(-1, targets[..., None]).squeeze(-1)}
    with torch.no_grad():
        if "entropy" in outputs:
            scores["entropy"] = -(all_log_probs.exp() * all_log_probs).sum(-1)
        if "log_sum_sq_probs" in outputs:
            scores["log_sum_sq_probs"] = (2 * all_log_probs).logsumexp(-1)
        if "mean_logits" in outputs:
            scores["mean_logits"] = logits.mean(-1)
        if "is_top1" in outputs:
            scores["is_top1"] = logits.argmax(-1) == targets
    return scores
