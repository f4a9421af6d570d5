"""The upper tail of the margin distribution: its threshold, a test, and a β that answers the test.

Arithmetic on numpy arrays and nothing else. A margin is M = (log π(y_w|x) − log π(y_l|x)) − (log π_ref(y_w|x) −
log π_ref(y_l|x)), in nats and not scaled by β. The tail is P(M > τ), which δ says how large to expect.

The order within a step is fixed. During warm-up margins are only collected, and the last warm-up step sets τ. After
it: τ moves towards the batch's quantile, p_hat is the share of the batch above the *moved* τ, the test compares
p_hat with δ, and the control sets the β of the next step. So the batch has a say of weight λ in the threshold it is
held against, which lets a lasting shift become the new normal and makes the test a little slower to fire: keep λ
small. The threshold, test and control together are Tandem's own rule, docs/tail-monitor.md; its parts have the
sources named below.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclasses.dataclass(frozen=True)
class TailConfig:
    """Constants of the tail monitor; `tandem.monitor.options.MonitorOptions` checks them."""

    delta: float
    """δ: the share of margins expected above τ, in (0, 1)."""
    warmup_steps: int
    """Optimizer steps whose margins set the first τ, at least 1."""
    ema: float
    """λ: weight of a batch's quantile in τ, in [0, 1)."""
    test: Literal["plain", "hoeffding"] = "plain"
    epsilon: float = 0.05
    """ε₀: probability of a false alarm per step that the Hoeffding test allows, in (0, 1)."""
    beta_control: Literal["none", "risk"] = "none"
    beta_min: float = 0.0
    beta_max: float = math.inf
    beta_alpha: float = 0.0
    """α: one step changes log β by at most this."""
    beta_gamma: float = 0.0
    """γ: how sharply the control answers the standardised excess u."""


@dataclasses.dataclass(frozen=True)
class TailState:
    """What the monitor carries from one optimizer step to the next; equal on all ranks."""

    beta: float
    """β for the next step's loss."""
    tau: float | None = None
    """Threshold in nats, None until the warm-up has ended."""
    buffer: tuple[float, ...] = ()
    """Margins of the warm-up so far, in nats; empty after it."""
    steps: int = 0
    """Optimizer steps seen."""
    tests: int = 0
    """Steps tested."""
    failures: int = 0
    """Tests that failed, which is steps where the tail was too heavy."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; `from_dict` after a round trip through JSON gives an equal state, bit for bit."""
        return dataclasses.asdict(self) | {"buffer": list(self.buffer)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values | {"buffer": tuple(values["buffer"])})


@dataclasses.dataclass(frozen=True)
class TailRecord:
    """What one optimizer step showed."""

    beta: float
    """β that the step's loss used; the one set by its test is the next record's."""
    tau: float | None
    """Threshold after the step; None during warm-up but for its last step, which sets it."""
    p_hat: float | None = None
    """Share of the step's margins above τ; None during warm-up."""
    over: bool | None = None
    """Whether the tail test failed; None during warm-up."""
    warmup_ended: bool = False
    """True for the one step that set the first τ."""


def upper_quantile(margins: ArrayLike, delta: float) -> float:
    """The 1−δ quantile of `margins` (n,), in their unit.

    Hyndman & Fan (1996), type 8, at rank h = (n + 1/3)(1−δ) + 1/3. The usual type 7 lies too low in a small sample:
    at n = 8 and δ = 0.1, 15% of a normal distribution lie above its mean position, 9% above type 8's, so a
    stationary run would fail its tests for no other reason than a small batch.
    """
    return float(np.quantile(np.asarray(margins, dtype=np.float64), 1.0 - delta, method="median_unbiased"))


def moved_threshold(tau: float, quantile: float, ema: float) -> float:
    """τ ← (1−λ)·τ + λ·quantile: exponential moving average, λ the weight of the new value."""
    return (1.0 - ema) * tau + ema * quantile


def tail_share(margins: ArrayLike, tau: float) -> float:
    """p_hat: the share of `margins` (n,) strictly above τ."""
    return float(np.mean(np.asarray(margins, dtype=np.float64) > tau))


def hoeffding_slack(n: int, epsilon: float) -> float:
    """sqrt(ln(1/ε₀) / 2n).

    Hoeffding (1963), Theorem 1: for n independent draws, P(p_hat − p ≥ t) ≤ exp(−2nt²); this is the t at which the
    right side is ε₀.
    """
    return math.sqrt(math.log(1.0 / epsilon) / (2.0 * n))


def tail_bound(n: int, config: TailConfig) -> float:
    """δ', the share above which the test of n margins fails: δ, or δ + `hoeffding_slack`."""
    if config.test == "hoeffding":
        return config.delta + hoeffding_slack(n, config.epsilon)
    return config.delta


def standardised_excess(p_hat: float, delta: float, n: int) -> float:
    """u = (p_hat − δ) / sqrt(δ(1−δ)/n): the score statistic of a binomial share, N(0, 1) for large n if p = δ."""
    return (p_hat - delta) / math.sqrt(delta * (1.0 - delta) / n)


def controlled_beta(beta: float, p_hat: float, n: int, config: TailConfig) -> float:
    """β ← clip(β·exp(α·tanh(γ·u)), β_min, β_max): a heavy tail raises β, a light one lowers it.

    Multiplicative, so that up and down are symmetric in log β; tanh bounds the answer to a single odd batch.
    """
    u = standardised_excess(p_hat, config.delta, n)
    moved = beta * math.exp(config.beta_alpha * math.tanh(config.beta_gamma * u))
    return min(max(moved, config.beta_min), config.beta_max)


def update(state: TailState, margins: ArrayLike, config: TailConfig) -> tuple[TailState, TailRecord]:
    """One optimizer step: the state after it and what it showed. `state` is left as it is.

    Args:
        margins: (n,) margins of the whole global batch, each pair once, in nats.

    Raises:
        ValueError: no margins, or one that is not finite.
    """
    batch: NDArray[np.float64] = np.asarray(margins, dtype=np.float64)
    if batch.ndim != 1 or batch.size == 0 or not np.isfinite(batch).all():
        raise ValueError(f"expected finite margins of shape (n,) with n > 0, got shape {batch.shape}")
    if state.tau is None:
        return _warm_up(state, batch.tolist(), config)
    tau = moved_threshold(state.tau, upper_quantile(batch, config.delta), config.ema)
    p_hat = tail_share(batch, tau)
    over = p_hat > tail_bound(batch.size, config)
    beta = state.beta
    if config.beta_control == "risk":
        beta = controlled_beta(beta, p_hat, batch.size, config)
    after = dataclasses.replace(
        state,
        tau=tau,
        beta=beta,
        steps=state.steps + 1,
        tests=state.tests + 1,
        failures=state.failures + over,
    )
    return after, TailRecord(beta=state.beta, tau=tau, p_hat=p_hat, over=over)


def _warm_up(state: TailState, batch: Sequence[float], config: TailConfig) -> tuple[TailState, TailRecord]:
    buffer = (*state.buffer, *batch)
    steps = state.steps + 1
    if steps < config.warmup_steps:
        return dataclasses.replace(state, buffer=buffer, steps=steps), TailRecord(beta=state.beta, tau=None)
    tau = upper_quantile(buffer, config.delta)
    after = dataclasses.replace(state, tau=tau, buffer=(), steps=steps)
    return after, TailRecord(beta=state.beta, tau=tau, warmup_ended=True)
