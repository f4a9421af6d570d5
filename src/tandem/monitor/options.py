"""Options of the tail monitor and the collapse alarms."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from tandem.errors import UserError
from tandem.monitor.tail import TailConfig
from tandem.options.fields import opt
from tandem.options.rules import Options

ACTIONS = ("warn", "stop")


def _off_at(limit: str) -> str:
    return f"{limit}=0, which turns the alarm off"


@dataclasses.dataclass
class MonitorOptions(Options):
    """Tail monitor and alarms."""

    tail_delta: float = opt(0.1, "δ: share of margins expected above the threshold τ", above=0, below=1)
    tail_warmup_steps: int = opt(20, "optimizer steps whose margins set the first τ", low=1)
    tail_ema: float = opt(
        0.05,
        "λ: weight of a batch's quantile in τ; 0: τ stays where the warm-up put it",
        low=0,
        below=1,
        hint="at 1 no test could ever fail",
    )
    tail_test: str = opt("plain", "fail at p_hat > δ, or beyond what chance explains", choices=("plain", "hoeffding"))
    tail_epsilon: float = opt(
        0.05,
        "ε₀: false alarms per step that --tail_test hoeffding allows",
        above=0,
        below=1,
        needs="tail_test=hoeffding",
    )
    beta_control: str = opt("none", "risk: raise β while the tail is too heavy", choices=("none", "risk"))
    beta_min: float = opt(0.01, "least β of --beta_control risk", above=0, needs="beta_control=risk")
    beta_max: float = opt(1.0, "greatest β of --beta_control risk", needs="beta_control=risk")
    beta_alpha: float = opt(
        0.05,
        "α of --beta_control risk: a step changes log β by at most this",
        above=0,
        needs="beta_control=risk",
    )
    beta_gamma: float = opt(
        0.5,
        "γ of --beta_control risk: how sharply β answers an excess of one standard error",
        above=0,
        needs="beta_control=risk",
    )
    alarm_nonfinite: str = opt("stop", "on a loss, margin, gradient or weight that is not finite", choices=ACTIONS)
    alarm_chosen_falling: str = opt(
        "warn", "on --alarm_chosen_falling_logs", choices=ACTIONS, unless=_off_at("alarm_chosen_falling_logs")
    )
    alarm_chosen_falling_logs: int = opt(20, "chosen log-prob below the log before, this often in a row; 0: off", low=0)
    alarm_accuracy_pinned: str = opt(
        "warn", "on --alarm_accuracy_pinned_logs", choices=ACTIONS, unless=_off_at("alarm_accuracy_pinned_logs")
    )
    alarm_accuracy_pinned_logs: int = opt(20, "accuracy at 0.5 or at 1.0 for this many logs in a row; 0: off", low=0)
    alarm_accuracy_pinned_within: float = opt(
        0.01,
        "how close to 0.5 or 1.0 counts as at it",
        low=0,
        below=0.25,
        unless=_off_at("alarm_accuracy_pinned_logs"),
    )
    alarm_stuck: str = opt("warn", "on --alarm_stuck_steps", choices=ACTIONS, unless=_off_at("alarm_stuck_steps"))
    alarm_stuck_steps: int = opt(
        100, "the loss is where it began, at ln 2, after this many steps, or at an earlier end; 0: off", low=0
    )
    alarm_kl: str = opt("warn", "on --alarm_kl_max", choices=ACTIONS, unless=_off_at("alarm_kl_max"))
    alarm_kl_max: float = opt(100.0, "mean KL estimate between policy and reference, in nats per answer; 0: off", low=0)
    alarm_grad_spike: str = opt(
        "warn", "on --alarm_grad_spike_factor", choices=ACTIONS, unless=_off_at("alarm_grad_spike_factor")
    )
    alarm_grad_spike_factor: float = opt(
        10.0, "gradient norm over this many times its running median; 0: off", above=1, besides={0: ""}
    )

    def conflicts(self) -> Iterator[str]:
        if self.beta_max <= self.beta_min:
            yield f"--beta_max must be above --beta_min {self.beta_min}, not {self.beta_max}"

    def check_beta(self, beta: float) -> None:
        """Refuse a --beta (of the DPO options) that the control would move before it has seen a margin.

        Raises:
            UserError: β lies outside of the control's range.
        """
        if self.beta_control == "risk" and not self.beta_min <= beta <= self.beta_max:
            raise UserError(f"--beta {beta} is outside of --beta_min {self.beta_min} to --beta_max {self.beta_max}")

    def tail_config(self) -> TailConfig:
        """The constants of the arithmetic."""
        values: dict[str, Any] = {
            field.name: getattr(self, field.name if field.name.startswith("beta_") else f"tail_{field.name}")
            for field in dataclasses.fields(TailConfig)
        }
        return TailConfig(**values)
