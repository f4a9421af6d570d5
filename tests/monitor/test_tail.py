"""The tail's arithmetic: numbers derived by hand, then its behaviour in simulation."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from tandem.monitor.tail import (
    TailConfig,
    TailState,
    controlled_beta,
    hoeffding_slack,
    moved_threshold,
    standardised_excess,
    tail_bound,
    tail_share,
    update,
    upper_quantile,
)

PLAIN = TailConfig(delta=0.1, warmup_steps=2, ema=0.25)
RISK = dataclasses.replace(
    PLAIN, beta_control="risk", beta_min=0.05, beta_max=1.0, beta_alpha=0.1, beta_gamma=0.5, ema=0.01
)


def test_quantile_is_type_8() -> None:
    # n = 10, 1−δ = 0.9: h = (10 + 1/3)·0.9 + 1/3 = 9.6333…, and of 1, 2, …, 10 the value at rank h is h
    assert upper_quantile(range(1, 11), 0.1) == pytest.approx(9.3 + 1 / 3)
    # δ = 0.5 is the median whatever the type: h = 10.333·0.5 + 1/3 = 5.5
    assert upper_quantile(range(1, 11), 0.5) == pytest.approx(5.5)
    assert upper_quantile([3.0], 0.1) == 3.0


def test_threshold_moves_by_lambda() -> None:
    assert moved_threshold(2.0, 6.0, 0.25) == 3.0  # 0.75·2 + 0.25·6
    assert moved_threshold(2.0, 6.0, 0.0) == 2.0


def test_share_is_strictly_above() -> None:
    assert tail_share([1.0, 2.0, 2.0, 3.0], 2.0) == 0.25


def test_hoeffding_bound() -> None:
    # ε₀ = e⁻², n = 4: sqrt(2 / 8) = 0.5
    assert hoeffding_slack(4, math.exp(-2)) == pytest.approx(0.5)
    assert tail_bound(4, PLAIN) == 0.1
    hoeffding = dataclasses.replace(PLAIN, test="hoeffding", epsilon=math.exp(-2))
    assert tail_bound(4, hoeffding) == pytest.approx(0.6)
    assert tail_bound(400, hoeffding) == pytest.approx(0.15)


def test_standardised_excess() -> None:
    # sqrt(0.1·0.9/100) = 0.03
    assert standardised_excess(0.16, 0.1, 100) == pytest.approx(2.0)
    assert standardised_excess(0.07, 0.1, 100) == pytest.approx(-1.0)


def test_controlled_beta() -> None:
    # u = 2, γu = 1, tanh(1) = 0.7615942: β·exp(0.1·0.7615942) = 0.2·1.0791346
    assert controlled_beta(0.2, 0.16, 100, RISK) == pytest.approx(0.21582692)
    # and back: u = −2 undoes u = 2
    assert controlled_beta(0.21582692, 0.04, 100, RISK) == pytest.approx(0.2)
    assert controlled_beta(0.2, 0.1, 100, RISK) == 0.2
    assert controlled_beta(0.99, 1.0, 100, RISK) == 1.0
    assert controlled_beta(0.0501, 0.0, 10_000, RISK) == 0.05


def test_steps_by_hand() -> None:
    config = TailConfig(delta=0.5, warmup_steps=2, ema=0.25)
    state = TailState(beta=0.3)

    state, record = update(state, [1.0, 2.0], config)
    assert (record.tau, record.p_hat, record.over, record.warmup_ended) == (None, None, None, False)
    assert state == TailState(beta=0.3, buffer=(1.0, 2.0), steps=1)

    state, record = update(state, [3.0, 4.0], config)  # median of 1, 2, 3, 4
    assert (record.tau, record.p_hat, record.over, record.warmup_ended) == (2.5, None, None, True)
    assert state == TailState(beta=0.3, tau=2.5, steps=2)

    # quantile 4, so τ = 0.75·2.5 + 0.25·4 = 2.875 first, and then two of the three margins are above it
    state, record = update(state, [2.75, 4.0, 6.0], config)
    assert (record.tau, record.p_hat, record.over, record.beta) == (2.875, 2 / 3, True, 0.3)
    # quantile 1: τ = 0.75·2.875 + 0.25·1 = 2.40625
    state, record = update(state, [1.0, 1.0, 2.5], config)
    assert (record.tau, record.p_hat, record.over) == (2.40625, 1 / 3, False)
    assert state == TailState(beta=0.3, tau=2.40625, steps=4, tests=2, failures=1)


def test_p_hat_of_delta_is_no_failure() -> None:
    config = TailConfig(delta=0.25, warmup_steps=1, ema=0.0)
    state, _ = update(TailState(beta=0.1), [0.0], config)
    assert update(state, [-1.0, -1.0, -1.0, 1.0], config)[1].over is False
    assert update(state, [-1.0, -1.0, 1.0, 1.0], config)[1].over is True


def test_beta_of_a_record_is_the_one_its_step_used() -> None:
    state, _ = update(TailState(beta=0.2), np.zeros(100), dataclasses.replace(RISK, warmup_steps=1))
    after, record = update(state, np.ones(100), RISK)
    assert record.beta == 0.2
    assert after.beta > 0.2


def test_no_control_leaves_beta() -> None:
    state, _ = update(TailState(beta=0.2), np.zeros(100), dataclasses.replace(PLAIN, warmup_steps=1))
    assert update(state, np.ones(100), PLAIN)[0].beta == 0.2


@pytest.mark.parametrize("margins", [[], [1.0, math.nan], [math.inf], [[1.0], [2.0]]])
def test_refuses_what_has_no_tail(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="finite margins of shape"):
        update(TailState(beta=0.1), margins, PLAIN)


finite = st.floats(-1e6, 1e6)


@given(
    steps=st.lists(st.lists(finite, min_size=1, max_size=9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
)
def test_a_state_through_json_goes_on_bit_for_bit(steps: list[list[float]], cut: int) -> None:
    whole = resumed = TailState(beta=0.1)
    for at, margins in enumerate(steps):
        if at == cut:
            resumed = TailState.from_dict(json.loads(json.dumps(resumed.to_dict())))
        whole, expected = update(whole, margins, RISK)
        resumed, record = update(resumed, margins, RISK)
        assert record == expected
    assert resumed == whole


@pytest.mark.parametrize("n", [8, 32, 128])
def test_settles_at_delta_on_stationary_draws(n: int) -> None:
    rng = np.random.default_rng(n)
    config = TailConfig(delta=0.1, warmup_steps=20, ema=0.02)
    state, shares = TailState(beta=0.1), []
    for _ in range(4000):
        state, record = update(state, rng.normal(1.0, 3.0, n), config)
        if record.p_hat is not None:
            shares.append(record.p_hat)
    settled = shares[500:]
    # Sampling error of the mean of p_hat over 3480 steps, plus half a point for what is left of the quantile's bias
    error = math.sqrt(0.1 * 0.9 / (n * len(settled)))
    assert abs(np.mean(settled) - 0.1) < 3 * error + 0.006
    # Spread as of a binomial share: of its 90% interval at least 85 in 100 steps
    low, high = binom.interval(0.9, n, 0.1)
    assert np.mean([low <= round(p * n) <= high for p in settled]) > 0.85


def test_hoeffding_rarely_fires_on_stationary_draws() -> None:
    rng = np.random.default_rng(1)
    config = TailConfig(delta=0.1, warmup_steps=20, ema=0.02, test="hoeffding", epsilon=0.05)
    state = TailState(beta=0.1)
    for _ in range(2000):
        state, _ = update(state, rng.normal(0.0, 1.0, 32), config)
    assert state.failures <= 0.05 * state.tests


@pytest.mark.parametrize("test", ["plain", "hoeffding"])
def test_fires_within_three_steps_of_a_shift(test: str) -> None:
    rng = np.random.default_rng(2)
    config = TailConfig(delta=0.1, warmup_steps=20, ema=0.02, test=test, epsilon=0.05)  # type: ignore[arg-type]
    state = TailState(beta=0.1)
    for _ in range(200):
        state, _ = update(state, rng.normal(0.0, 1.0, 64), config)
    fired = []
    for _ in range(3):  # the mean moves by two standard deviations: P(M > τ) goes from 0.1 to 0.76
        state, record = update(state, rng.normal(2.0, 1.0, 64), config)
        fired.append(record.over)
    assert fired == [True, True, True]


def simulate_training(control: str) -> list[float]:
    """p_hat per step where margins grow towards r/β, DPO's optimum, so that a larger β shrinks them."""
    rng = np.random.default_rng(3)
    config = dataclasses.replace(RISK, warmup_steps=20, beta_control=control)  # type: ignore[arg-type]
    state, scale, shares = TailState(beta=0.1), 1.0, []
    for step in range(300):
        growth = 0.1 if step < 20 else 0.2  # reward scale: after the warm-up the policy over-optimises
        scale += 0.1 * (growth / state.beta - scale)
        state, record = update(state, scale * rng.normal(0.5, 1.0, 64), config)
        if record.p_hat is not None:
            shares.append(record.p_hat)
    return shares


def test_risk_control_brings_the_tail_back() -> None:
    bound = tail_bound(64, dataclasses.replace(RISK, test="hoeffding", epsilon=0.05))  # δ' = 0.253
    loose, held = simulate_training("none"), simulate_training("risk")
    assert np.mean(loose[20:60]) > bound
    assert np.mean(held[20:60]) < bound
    assert np.mean([p < bound for p in held[20:]]) > 0.95
    assert np.mean(held[100:]) == pytest.approx(0.1, abs=0.03)


def test_imports_no_framework() -> None:
    code = "import sys, tandem.monitor.tail; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
