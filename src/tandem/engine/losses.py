"""Losses of pairs beside TRL's: what such a loss is given, and those that Tandem has itself."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem.errors import UserError
from tandem.options.losses import DPOOptions, Loss


@dataclass(frozen=True)
class Pairs:
    """What a loss is given of a micro-batch of B pairs. May grow: a loss takes what it needs by name.

    Attributes:
        chosen_logps, rejected_logps: (B,) float32 nats, with gradient: the policy's log-prob of each answer, summed
            over its tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) float32 nats, the reference's; None in a run without a reference.
        chosen_lengths, rejected_lengths: (B,) int64, tokens of each answer, at least 1.
        beta: β.
        options: all options of the objective: `label_smoothing`, `simpo_gamma` and the others.
        weight: (B,) float32, what the value of each pair is multiplied by afterwards; None: 1.
        margin: (B,) float32, of the data's column of that name; None: 0.
        group: (B,) int64, equal for pairs of one prompt with several rejected answers; None where there are none.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    beta: float
    options: DPOOptions
    weight: Tensor | None = None
    margin: Tensor | None = None
    group: Tensor | None = None


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def _beyond(logits: Tensor, pairs: Pairs) -> Tensor:
    """What of a reward margin is more than the data's (ODPO, Amini et al. 2024, Eq. 8)."""
    return logits if pairs.margin is None else logits - pairs.margin


def mean_rewards(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """β times the mean log-prob over the tokens of each answer (SimPO, Meng et al. 2024, Eq. 4), (B,) each."""
    return (
        pairs.beta * pairs.chosen_logps / pairs.chosen_lengths,
        pairs.beta * pairs.rejected_logps / pairs.rejected_lengths,
    )


def simpo(pairs: Pairs) -> Tensor:
    """−log σ(r(chosen) − r(rejected) − γ), r by `mean_rewards` (SimPO, Meng et al. 2024, Eq. 6), (B,).

    A pair's margin is added to γ.
    """
    chosen, rejected = mean_rewards(pairs)
    return _smoothed(_beyond(chosen - rejected - pairs.options.simpo_gamma, pairs), pairs.options.label_smoothing)


def cpo(pairs: Pairs) -> Tensor:
    """−log σ(β log π(chosen) − β log π(rejected)) (CPO, Xu et al. 2024, Eq. 3; with `sft` it is the whole), (B,).

    A pair's margin is subtracted from the difference.
    """
    logits = pairs.beta * (pairs.chosen_logps - pairs.rejected_logps)
    return _smoothed(_beyond(logits, pairs), pairs.options.label_smoothing)


def _resolved(function: Callable[[Any], Any] | str) -> Callable[[Any], Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    resolved: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return resolved


def pair_losses(loss: Loss, pairs: Pairs) -> Tensor:
    """(B,) `loss` of each pair.

    Raises:
        UserError: a user's function gives anything else.
    """
    assert loss.per_pair is not None
    values = _resolved(loss.per_pair)(pairs)
    if not isinstance(values, Tensor) or values.shape != pairs.chosen_logps.shape:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise UserError(
            f"--loss_type {loss.name}: must give one value a pair, {tuple(pairs.chosen_logps.shape)}; {got}"
        )
    if torch.is_grad_enabled() and not values.requires_grad:
        raise UserError(f"--loss_type {loss.name}: has no gradient: it must be computed from the log-probs it is given")
    return values


def rewards(loss: Loss, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The implicit rewards of chosen and rejected answers under `loss`, (B,) each, without gradient."""
    with torch.no_grad():
        if loss.rewards is not None:
            chosen, rejected = _resolved(loss.rewards)(pairs)
            return chosen, rejected
        if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
            return pairs.beta * pairs.chosen_logps, pairs.beta * pairs.rejected_logps
        return (
            pairs.beta * (pairs.chosen_logps - pairs.ref_chosen_logps),
            pairs.beta * (pairs.rejected_logps - pairs.ref_rejected_logps),
        )
