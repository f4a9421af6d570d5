"""Options are checked when they are read."""

import pytest

from tandem.errors import UserError
from tandem.monitor.options import MonitorOptions
from tandem.monitor.tail import TailConfig
from tandem.options.fields import options_of
from tandem.options.parsing import parse

BAD = {
    "tail_delta": ("0", "1", "-0.1"),
    "tail_warmup_steps": ("0",),
    "tail_ema": ("-0.1", "1"),
    "tail_epsilon": ("0", "1"),
    "tail_test": ("exact",),
    "beta_control": ("yes",),
    "beta_min": ("0",),
    "beta_max": ("0.01",),
    "beta_alpha": ("0",),
    "beta_gamma": ("-1",),
    "alarm_nonfinite": ("off",),
    "alarm_chosen_falling_logs": ("-1",),
    "alarm_accuracy_pinned_logs": ("-1",),
    "alarm_accuracy_pinned_within": ("0.25", "-0.1"),
    "alarm_stuck_steps": ("-1",),
    "alarm_kl_max": ("-1",),
    "alarm_grad_spike_factor": ("1", "-2"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_nonsense_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"\b{name}\b"):
        parse([f"--{name}", value], [MonitorOptions], prog="dpo")


@pytest.mark.parametrize(
    ("argv", "switch"),
    [
        (["--tail_epsilon", "0.1"], "--tail_test hoeffding"),
        (["--beta_min", "0.02"], "--beta_control risk"),
        (["--beta_max", "0.5"], "--beta_control risk"),
        (["--beta_alpha", "0.1"], "--beta_control risk"),
        (["--beta_gamma", "1"], "--beta_control risk"),
        (["--alarm_kl", "stop", "--alarm_kl_max", "0"], "--alarm_kl_max 0"),
        (["--alarm_accuracy_pinned_within", "0.1", "--alarm_accuracy_pinned_logs", "0"], "pinned_logs 0"),
        (["--alarm_stuck", "stop", "--alarm_stuck_steps", "0"], "stuck_steps 0"),
        (["--alarm_grad_spike", "stop", "--alarm_grad_spike_factor", "0"], "spike_factor 0"),
        (["--alarm_chosen_falling", "stop", "--alarm_chosen_falling_logs", "0"], "falling_logs 0"),
    ],
)
def test_an_option_without_effect_is_refused(argv: list[str], switch: str) -> None:
    with pytest.raises(UserError, match=f"{argv[0]} has no effect .*{switch}"):
        parse(argv, [MonitorOptions], prog="dpo")


def test_beta_must_lie_in_the_controls_range() -> None:
    MonitorOptions().check_beta(5.0)
    control = MonitorOptions(beta_control="risk", beta_min=0.05, beta_max=0.5)
    control.check_beta(0.05)
    for beta in (0.04, 0.6):
        with pytest.raises(UserError, match=f"--beta {beta} is outside of --beta_min 0.05 to --beta_max 0.5"):
            control.check_beta(beta)


def test_arithmetic_gets_what_the_user_set() -> None:
    argv = (
        "--tail_delta 0.2 --tail_warmup_steps 3 --tail_ema 0.3 --tail_test hoeffding --tail_epsilon 0.4 "
        "--beta_control risk --beta_min 0.05 --beta_max 0.6 --beta_alpha 0.7 --beta_gamma 0.8"
    )
    (options,) = parse(argv.split(), [MonitorOptions], prog="dpo")
    assert options.tail_config() == TailConfig(
        delta=0.2,
        warmup_steps=3,
        ema=0.3,
        test="hoeffding",
        epsilon=0.4,
        beta_control="risk",
        beta_min=0.05,
        beta_max=0.6,
        beta_alpha=0.7,
        beta_gamma=0.8,
    )


def test_every_option_explains_itself() -> None:
    assert all(option.help for option in options_of(MonitorOptions))
