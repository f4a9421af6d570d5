"""Options of the tail monitor and the collapse alarms."""

import dataclasses
from typing import Any

from tandem.errors import UserError
from tandem.monitor.tail import TailConfig
from tandem.options.parsing import opt

ACTIONS = ("warn", "stop")


@dataclasses.dataclass
class MonitorOptions:
    """Tail monitor and alarms."""

    tail_delta: float = opt(0.1, "δ: share of margins expected above the threshold τ")
    tail_warmup_steps: int = opt(20, "optimizer steps whose margins set the first τ")
    tail_ema: float = opt(0.05, "λ: weight of a batch's quantile in τ; 0: τ stays where the warm-up put it")
    tail_test: str = opt("plain", "fail at p_hat > δ, or beyond what chance explains", choices=("plain", "hoeffding"))
    tail_epsilon: float = opt(0.05, "ε₀: false alarms per step that --tail_test hoeffding allows")
    beta_control: str = opt("none", "risk: raise β while the tail is too heavy", choices=("none", "risk"))
    beta_min: float = opt(0.01, "least β of --beta_control risk")
    beta_max: float = opt(1.0, "greatest β of --beta_control risk")
    beta_alpha: float = opt(0.05, "α of --beta_control risk: a step changes log β by at most this")
    beta_gamma: float = opt(0.5, "γ of --beta_control risk: how sharply β answers an excess of one standard error")
    alarm_nonfinite: str = opt("stop", "on a loss, margin, gradient or weight that is not finite", choices=ACTIONS)
    alarm_chosen_falling: str = opt("warn", "on --alarm_chosen_falling_logs", choices=ACTIONS)
    alarm_chosen_falling_logs: int = opt(20, "chosen log-prob below the log before, this often in a row; 0: off")
    alarm_accuracy_pinned: str = opt("warn", "on --alarm_accuracy_pinned_logs", choices=ACTIONS)
    alarm_accuracy_pinned_logs: int = opt(20, "accuracy at 0.5 or at 1.0 for this many logs in a row; 0: off")
    alarm_accuracy_pinned_within: float = opt(0.01, "how close to 0.5 or 1.0 counts as at it")
    alarm_kl: str = opt("warn", "on --alarm_kl_max", choices=ACTIONS)
    alarm_kl_max: float = opt(100.0, "mean KL estimate between policy and reference, in nats per answer; 0: off")
    alarm_grad_spike: str = opt("warn", "on --alarm_grad_spike_factor", choices=ACTIONS)
    alarm_grad_spike_factor: float = opt(10.0, "gradient norm over this many times its running median; 0: off")

    def __post_init__(self) -> None:
        self._require(0 < self.tail_delta < 1, "tail_delta", "above 0 and below 1")
        self._require(self.tail_warmup_steps >= 1, "tail_warmup_steps", "at least 1")
        self._require(0 <= self.tail_ema < 1, "tail_ema", "at least 0 and below 1: at 1 no test could ever fail")
        self._require(0 < self.tail_epsilon < 1, "tail_epsilon", "above 0 and below 1")
        self._require(self.beta_min > 0, "beta_min", "above 0")
        self._require(self.beta_max > self.beta_min, "beta_max", f"above --beta_min {self.beta_min}")
        self._require(self.beta_alpha > 0, "beta_alpha", "above 0")
        self._require(self.beta_gamma > 0, "beta_gamma", "above 0")
        self._require(0 <= self.alarm_accuracy_pinned_within < 0.25, "alarm_accuracy_pinned_within", "in [0, 0.25)")
        for name in ("alarm_chosen_falling_logs", "alarm_accuracy_pinned_logs", "alarm_kl_max"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        factor = self.alarm_grad_spike_factor
        self._require(factor == 0 or factor > 1, "alarm_grad_spike_factor", "above 1, or 0")
        self._refuse_without_effect()

    def _require(self, holds: bool, name: str, condition: str) -> None:
        if not holds:
            raise UserError(f"--{name} must be {condition}, not {getattr(self, name)}")

    def _refuse_without_effect(self) -> None:
        if self.tail_test != "hoeffding" and self._changed("tail_epsilon"):
            raise UserError("--tail_epsilon has no effect without --tail_test hoeffding")
        if self.beta_control != "risk":
            for name in ("beta_min", "beta_max", "beta_alpha", "beta_gamma"):
                if self._changed(name):
                    raise UserError(f"--{name} has no effect without --beta_control risk")
        for name, switch in _SWITCHES.items():
            if not getattr(self, switch) and self._changed(name):
                raise UserError(f"--{name} has no effect with --{switch} 0, which turns the alarm off")

    def _changed(self, name: str) -> bool:
        return getattr(self, name) != getattr(type(self), name)

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


_SWITCHES = {
    "alarm_chosen_falling": "alarm_chosen_falling_logs",
    "alarm_accuracy_pinned": "alarm_accuracy_pinned_logs",
    "alarm_accuracy_pinned_within": "alarm_accuracy_pinned_logs",
    "alarm_kl": "alarm_kl_max",
    "alarm_grad_spike": "alarm_grad_spike_factor",
}
