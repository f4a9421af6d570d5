"""Collapse alarms: which of them fire, on numbers that are the same on all ranks, so that all ranks agree.

Nothing here acts: `tandem.monitor.monitor` warns, or saves and stops. An alarm about a streak fires once when the
streak gets long enough, and again only after it was broken; one about a bound fires when the bound is crossed.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from tandem.monitor.gather import Step
from tandem.monitor.options import MonitorOptions

GRAD_WINDOW = 50  # steps that the running median is taken of
GRAD_WARMUP = 10  # fewest steps that it is taken of
# β times the mean margin below which a policy counts as stuck. The loss has then moved from ln 2 by half of that;
# noise in bfloat16 makes it 0.001
STUCK_WITHIN = 0.01
STUCK_END = 20  # fewest steps of a run whose end is looked at


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One alarm that fired."""

    name: str
    """Its option is `--alarm_<name>`."""
    action: str
    """`warn` or `stop`."""
    value: float
    message: str
    """One line for people, with the unit."""
    pair_ids: tuple[str, ...] = ()
    """The pairs at fault, where some are."""
    sources: tuple[tuple[int, int], ...] = ()
    """Their (rank, micro-batch)."""

    def record(self, step: int, batches: Sequence[str] = ()) -> dict[str, Any]:
        """As a line of alarms.jsonl; a value that is not finite is written as text, since JSON has no NaN."""
        return {
            "step": step,
            "alarm": self.name,
            "action": self.action,
            "value": self.value if math.isfinite(self.value) else str(self.value),
            "message": self.message,
            "pair_ids": list(self.pair_ids),
            "batches": list(batches),
        }


@dataclasses.dataclass
class AlarmState:
    """What the alarms remember; saved with each checkpoint."""

    chosen_last: float | None = None
    """Mean chosen log-prob of the log before, in nats."""
    chosen_falling: int = 0
    """Logs in a row in which it fell."""
    accuracy_pinned: int = 0
    """Logs in a row in which accuracy was pinned at the same of 0.5 and 1.0."""
    accuracy_at: float | None = None
    has_moved: bool = False
    """Whether some log had margins that were not those of a policy still equal to its reference."""
    kl_over: bool = False
    grad_norms: list[float] = dataclasses.field(default_factory=list)
    """The latest gradient norms, at most GRAD_WINDOW."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def check_finite(step: Step, losses: Sequence[Sequence[float]], grad_norm: float | None, action: str) -> Alarm | None:
    """The alarm for a step that would ruin the weights, naming the pairs at fault as closely as can be told.

    Those are the pairs with a margin or log-prob that is not finite; else all pairs of the micro-batches whose loss
    is not; else, if only the gradient is not, all pairs of the step.

    Args:
        losses: per rank, per micro-batch.
        grad_norm: None where it is not known, or where a loss scaler expects it to overflow at times.
    """
    bad = np.flatnonzero(~step.finite)
    if bad.size:
        row = step.values[:3, bad[0]]
        value = float(row[~np.isfinite(row)][0])
        return _nonfinite("margin", value, [step.pair_ids[i] for i in bad], [step.sources[i] for i in bad], action)
    bad_losses = {
        (rank, micro): loss
        for rank, rank_losses in enumerate(losses)
        for micro, loss in enumerate(rank_losses)
        if not math.isfinite(loss)
    }
    if bad_losses:
        pairs = [pair for pair, source in zip(step.pair_ids, step.sources, strict=True) if source in bad_losses]
        return _nonfinite("loss", next(iter(bad_losses.values())), pairs, list(bad_losses), action)
    if grad_norm is not None and not math.isfinite(grad_norm):
        return _nonfinite("gradient norm", grad_norm, step.pair_ids, step.sources, action)
    return None


def _nonfinite(
    what: str, value: float, pair_ids: Sequence[str], sources: Sequence[tuple[int, int]], action: str
) -> Alarm:
    pairs = tuple(dict.fromkeys(pair_ids))
    shown = ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    message = f"{what} is {value} (pairs {shown})"
    return Alarm("nonfinite", action, value, message, pairs, tuple(dict.fromkeys(sources)))


def check_grad_norm(state: AlarmState, norm: float | None, options: MonitorOptions) -> Alarm | None:
    """Whether a finite gradient norm stands out from the median of the steps before. Updates `state`."""
    if norm is None or not math.isfinite(norm):
        return None
    factor = options.alarm_grad_spike_factor
    before = state.grad_norms
    state.grad_norms = [*before, norm][-GRAD_WINDOW:]
    if not factor or len(before) < GRAD_WARMUP:
        return None
    median = statistics.median(before)
    if norm <= factor * median:
        return None
    message = f"gradient norm {norm:.4g} is over {factor:g} times its running median {median:.4g}"
    return Alarm("grad_spike", options.alarm_grad_spike, norm, message)


def check_log(
    state: AlarmState, chosen_logps: float, accuracy: float, kl: float | None, options: MonitorOptions
) -> list[Alarm]:
    """The alarms about the steps since the log before. Updates `state`.

    Args:
        chosen_logps: their mean log π(y_w|x), nats per answer.
        accuracy: their share of margins above 0, a margin of 0 counted as a half.
        kl: their mean KL estimate, nats per answer; None if the trainer has none.
    """
    alarms = (
        _chosen_falling(state, chosen_logps, options),
        _accuracy_pinned(state, accuracy, options),
        _kl_over(state, kl, options),
    )
    return [alarm for alarm in alarms if alarm is not None]


def check_stuck(
    state: AlarmState, reward_margin: float, step: int, options: MonitorOptions, *, at_end: bool = False
) -> Alarm | None:
    """The alarm for a policy that has not left its reference. Updates `state`.

    Args:
        reward_margin: β times the mean margin of the steps since the log before.
        step: optimizer steps done.
        at_end: training ends here.
    """
    state.has_moved |= abs(reward_margin) > STUCK_WITHIN
    limit = options.alarm_stuck_steps
    if state.has_moved or not limit or step < (min(STUCK_END, limit) if at_end else limit):
        return None
    state.has_moved = True  # told once
    message = (
        f"after {step} steps the loss is still at ln 2 (β times the mean margin is {reward_margin:.1e}): the learning "
        "rate is too low, the weights are held too coarsely for it, or the answers of a pair are the same"
    )
    return Alarm("stuck", options.alarm_stuck, reward_margin, message)


def _chosen_falling(state: AlarmState, chosen_logps: float, options: MonitorOptions) -> Alarm | None:
    falls = state.chosen_last is not None and chosen_logps < state.chosen_last
    state.chosen_falling = state.chosen_falling + 1 if falls else 0
    state.chosen_last = chosen_logps
    if state.chosen_falling != options.alarm_chosen_falling_logs or not falls:
        return None
    message = f"chosen log-prob fell in {state.chosen_falling} logs in a row, to {chosen_logps:.4g} nats"
    return Alarm("chosen_falling", options.alarm_chosen_falling, chosen_logps, message)


def _accuracy_pinned(state: AlarmState, accuracy: float, options: MonitorOptions) -> Alarm | None:
    at = next((p for p in (0.5, 1.0) if abs(accuracy - p) <= options.alarm_accuracy_pinned_within), None)
    state.accuracy_pinned = 0 if at is None else state.accuracy_pinned + 1 if at == state.accuracy_at else 1
    state.accuracy_at = at
    if at is None or state.accuracy_pinned != options.alarm_accuracy_pinned_logs:
        return None
    meaning = "the policy learns nothing" if at == 0.5 else "the training pairs are learnt by heart"
    message = f"accuracy was at {at} for {state.accuracy_pinned} logs in a row: {meaning}"
    return Alarm("accuracy_pinned", options.alarm_accuracy_pinned, accuracy, message)


def _kl_over(state: AlarmState, kl: float | None, options: MonitorOptions) -> Alarm | None:
    over = kl is not None and options.alarm_kl_max > 0 and kl > options.alarm_kl_max
    crossed, state.kl_over = over and not state.kl_over, over
    if kl is None or not crossed:
        return None
    message = f"KL estimate {kl:.4g} nats per answer is over --alarm_kl_max {options.alarm_kl_max:g}"
    return Alarm("kl", options.alarm_kl, kl, message)
