"""The reference of a run that names none: the policy before training, whatever adapter it begins with."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel

from tandem.engine.precision import tolerance
from tandem.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

# Values of LoRA's `init_lora_weights` with which the adapter's product is zero at first. PiSSA, OLoRA and CorDA move a
# part of the base's weights into the adapter, others begin at random
_STARTS_AT_ZERO = (True, "gaussian", "eva")


def starts_as_its_base(added: "PeftConfig | None") -> bool:
    """Whether a policy to which the adapter `added` is given computes, before training, what its base does.

    Then the reference is the base without the adapter, and shares its cache entries with all other runs on that base.
    Otherwise the reference is the policy with its adapter on: an adapter that training goes on with (`added` is None),
    or one whose initialisation changes what the model computes.
    """
    return isinstance(added, LoraConfig) and added.init_lora_weights in _STARTS_AT_ZERO


@contextlib.contextmanager
def without_trls_copy(model: Any) -> Iterator[None]:
    """While TRL's constructor runs, no adapter `ref` is made of the one that `model` is trained on with.

    TRL would score with that copy, which lacks the parameters whose names end in the adapter's name. Making it would
    also change the base a second time with inits that do (PiSSA). The policy itself can be scored instead.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    find = model.get_parameter
    model.add_adapter = lambda *_, **__: None
    # TRL then copies each parameter to itself
    model.get_parameter = lambda name: find(name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


def gap(policy: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Difference per token of answers' log-probs, over max(1, mean |log p|): in the probe's unit.

    Args:
        policy, reference: (N,) nats.
        tokens: (N,) scored tokens of each.
    """
    scale = torch.maximum(tokens.sum(), reference.abs().sum())
    return (policy - reference).abs().sum() / scale.clamp(min=1)


def check_gap(found: float, computed: torch.dtype) -> None:
    """Stop a run whose reference is not the policy that it begins with.

    Args:
        found: the largest `gap` of any process in the first batch, both in evaluation mode, before the first update.
            NaN if the policy's outputs are, which the monitor reports.
        computed: dtype that the policy computes in.

    Raises:
        UserError: the difference is more than rounding explains.
    """
    limit = tolerance(computed)
    if found > limit:
        raise UserError(
            "the reference is not the policy before training: in the first batch their log-probs differ by "
            f"{found:.1e} per token, and rounding explains {limit:.0e}. Nothing was trained. Score the reference anew "
            "with another --ref_cache; if that does not help, name the model to be held to with --reference_model"
        )
