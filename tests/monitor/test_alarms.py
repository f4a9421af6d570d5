"""When alarms fire, and whom they name."""

import json
import math

import numpy as np
import pytest

from tandem.monitor.alarms import GRAD_WARMUP, AlarmState, check_finite, check_grad_norm, check_log, check_stuck
from tandem.monitor.gather import Step
from tandem.monitor.options import MonitorOptions

OPTIONS = MonitorOptions(
    alarm_chosen_falling_logs=3, alarm_accuracy_pinned_logs=3, alarm_accuracy_pinned_within=0.02, alarm_kl_max=5.0
)


def fired(
    chosen: list[float], accuracy: list[float], kl: list[float | None], options: MonitorOptions = OPTIONS
) -> list:
    """(log, name) of every alarm; the state goes through JSON between logs, as it does in a checkpoint."""
    state, names = AlarmState(), []
    for log, values in enumerate(zip(chosen, accuracy, kl, strict=True)):
        names += [(log, alarm.name) for alarm in check_log(state, *values, options)]
        state = AlarmState.from_dict(json.loads(json.dumps(state.to_dict())))
    return names


def test_chosen_falling_in_a_row() -> None:
    # falls at 1, 2, rises at 3, falls at 4, 5, 6 (fires) and 7 (no second time), rises, and a new streak fires
    chosen = [0.0, -1, -2, -1, -2, -3, -4, -5, 0, -1, -2, -3]
    quiet = [0.7] * len(chosen)
    assert fired(chosen, quiet, [None] * len(chosen)) == [(6, "chosen_falling"), (11, "chosen_falling")]


def test_equal_is_not_falling() -> None:
    assert fired([-1.0] * 9, [0.7] * 9, [None] * 9) == []


def test_accuracy_pinned() -> None:
    accuracy = [0.5, 0.51, 0.6, 0.49, 0.5, 1.0, 0.5, 0.99, 1.0, 1.0, 1.0]
    # 0.5 twice, broken; 0.49, 0.5, then 1.0 is another value; three at 1.0 from log 7 on
    assert fired(list(range(11)), accuracy, [None] * 11) == [(9, "accuracy_pinned")]


def test_kl_fires_on_crossing() -> None:
    kl: list[float | None] = [4.9, 5.1, 6.0, None, 5.1, 5.0, 5.1]
    assert fired(list(range(7)), [0.7] * 7, kl) == [(1, "kl"), (4, "kl"), (6, "kl")]


@pytest.mark.parametrize(
    ("margins", "step", "at_end", "fires"),
    [
        ([1e-4, -2e-3], 100, False, True),
        ([1e-4, -2e-3], 99, False, False),
        ([1e-4, -2e-3], 60, True, True),  # the run is over
        ([1e-4], 19, True, False),  # too short to tell
        ([0.3, 1e-4], 100, False, False),  # it was away, and came back: other alarms' business
    ],
)
def test_a_loss_that_stays_at_ln_2(margins: list[float], step: int, at_end: bool, fires: bool) -> None:
    state = AlarmState()
    for earlier in margins[:-1]:
        assert check_stuck(state, earlier, 10, OPTIONS) is None
    found = check_stuck(state, margins[-1], step, OPTIONS, at_end=at_end)
    assert (found is not None) == fires
    if found:
        assert f"after {step} steps the loss is still at ln 2" in found.message
        assert check_stuck(state, margins[-1], step + 1, OPTIONS) is None, "once is enough"


def test_zero_turns_off() -> None:
    off = MonitorOptions(
        alarm_chosen_falling_logs=0,
        alarm_accuracy_pinned_logs=0,
        alarm_kl_max=0,
        alarm_grad_spike_factor=0,
        alarm_stuck_steps=0,
    )
    assert check_stuck(AlarmState(), 0.0, 1000, off) is None
    assert fired([0.0, -1, -2, -3], [0.5] * 4, [1e9] * 4, off) == []
    state = AlarmState()
    assert [check_grad_norm(state, norm, off) for norm in [1.0] * 20 + [1e9]] == [None] * 21


def test_gradient_spike() -> None:
    options, state = MonitorOptions(), AlarmState()
    norms = [1.0] * (GRAD_WARMUP - 1)
    assert all(check_grad_norm(state, norm, options) is None for norm in norms)
    assert check_grad_norm(state, 99.0, options) is None  # too early to have a median
    assert check_grad_norm(state, 10.0, options) is None  # ten times the median of 1 is not over it
    spike = check_grad_norm(state, 10.1, options)
    assert spike is not None
    assert (spike.name, spike.action, spike.value) == ("grad_spike", "warn", 10.1)
    for norm in [20.0] * 40:
        check_grad_norm(state, norm, options)
    assert check_grad_norm(state, 20.0, options) is None  # the median has moved to 20
    assert len(state.grad_norms) == 50


def step(margins: list[float], sources: list[tuple[int, int]]) -> Step:
    values = np.zeros((4, len(margins)), np.float32)
    values[0], values[3] = margins, math.nan  # no KL estimate is no alarm
    return Step([f"p{i}" for i in range(len(margins))], values, sources)


def test_names_the_pairs_with_bad_margins() -> None:
    alarm = check_finite(
        step([0.0, math.nan, 1.0, math.inf], [(0, 0), (0, 1), (1, 0), (1, 1)]), [[0.0, math.nan]], math.nan, "stop"
    )
    assert alarm is not None
    assert (alarm.pair_ids, alarm.sources) == (("p1", "p3"), ((0, 1), (1, 1)))
    assert alarm.message == "margin is nan (pairs p1, p3)"
    assert alarm.record(7) == {
        "step": 7,
        "alarm": "nonfinite",
        "action": "stop",
        "value": "nan",
        "message": alarm.message,
        "pair_ids": ["p1", "p3"],
        "batches": [],
    }


def test_a_log_prob_that_is_not_finite_counts() -> None:
    bad = step([0.0, 0.0], [(0, 0), (0, 0)])
    bad.values[2, 1] = -math.inf
    alarm = check_finite(bad, [[0.0]], 1.0, "warn")
    assert alarm is not None
    assert (alarm.pair_ids, alarm.value, alarm.action) == (("p1",), -math.inf, "warn")


def test_names_the_micro_batch_of_a_bad_loss() -> None:
    sources = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]
    alarm = check_finite(step([0.0] * 5, sources), [[0.0, 0.0], [0.0, math.inf]], None, "stop")
    assert alarm is not None
    assert (alarm.pair_ids, alarm.sources) == (("p3", "p4"), ((1, 1),))
    assert alarm.message == "loss is inf (pairs p3, p4)"


def test_names_the_step_of_a_bad_gradient() -> None:
    alarm = check_finite(step([0.0] * 5, [(0, 0)] * 5), [[0.0]], math.nan, "stop")
    assert alarm is not None
    assert alarm.message == "gradient norm is nan (pairs p0, p1, p2 and 2 more)"
    assert len(alarm.pair_ids) == 5


@pytest.mark.parametrize("grad_norm", [None, 1e30])
def test_finite_is_no_alarm(grad_norm: float | None) -> None:
    assert check_finite(step([1e30, -1e30], [(0, 0)] * 2), [[1e30]], grad_norm, "stop") is None
