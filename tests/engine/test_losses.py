"""Losses of Tandem's own, beside TRL's experimental CPO trainer and numbers by hand."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tandem.engine.losses import Pairs, pair_losses, rewards
from tandem.errors import UserError
from tandem.options.losses import LOSSES, DPOOptions, Loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def pairs(options: DPOOptions, reference: bool = False) -> Pairs:
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in ([-12.0, -3.5], [-20.0, -2.0]))
    return Pairs(
        chosen,
        rejected,
        ref_chosen_logps=torch.tensor([-13.0, -3.0]) if reference else None,
        ref_rejected_logps=torch.tensor([-19.0, -3.0]) if reference else None,
        chosen_lengths=torch.tensor([6, 2]),
        rejected_lengths=torch.tensor([8, 1]),
        beta=options.beta,
        options=options,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("name", "theirs"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_own_losses_are_those_of_trls_cpo_trainer(name: str, theirs: str, smoothing: float):
    from trl.experimental.cpo import CPOTrainer

    gamma = {"simpo_gamma": 1.2} if name == "simpo" else {}
    options = DPOOptions(loss_type=[name], beta=2.0, label_smoothing=smoothing, **gamma)
    given = pairs(options)
    stock = SimpleNamespace(
        alpha=0.0, beta=2.0, loss_type=theirs, simpo_gamma=1.2, label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    logps = [given.chosen_logps, given.rejected_logps]
    if name == "simpo":  # which its trainer gives means over tokens
        logps = [logps[0] / given.chosen_lengths, logps[1] / given.rejected_lengths]
    losses, chosen, rejected = CPOTrainer.cpo_loss(stock, *logps)
    torch.testing.assert_close(pair_losses(LOSSES[name], given), losses)
    torch.testing.assert_close(rewards(LOSSES[name], given), (chosen, rejected))


def test_simpo_by_hand():
    """Means over tokens are −2 and −2.5, and −1.75 and −2; β 2, γ 0.5."""
    options = DPOOptions(loss_type=["simpo"], beta=2.0)
    values = pair_losses(LOSSES["simpo"], pairs(options))
    expected = [math.log1p(math.exp(-(2.0 * difference - 0.5))) for difference in (0.5, 0.25)]
    assert values.tolist() == pytest.approx(expected)


def test_rewards_are_log_ratios_where_there_is_a_reference():
    options = DPOOptions(beta=0.5)
    own = Loss("own", per_pair=lambda given: given.chosen_logps)
    assert [side.tolist() for side in rewards(own, pairs(options, reference=True))] == [[0.5, -0.25], [-0.5, 0.5]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda given: given.chosen_logps.mean(), "must give one value a pair"),
        (lambda given: 1.0, "must give one value a pair, (2,); float"),
        (lambda given: given.chosen_logps.detach(), "has no gradient"),
    ],
)
def test_what_a_function_gives_is_checked(function, message: str):
    with pytest.raises(UserError) as refusal:
        pair_losses(Loss("mine:loss", per_pair=function), pairs(DPOOptions()))
    assert str(refusal.value).startswith("--loss_type mine:loss: ") and message in str(refusal.value)


def test_a_users_file_is_executed_once(tmp_path: Path):
    """Though every micro-batch asks for the losses."""
    runs, file = tmp_path / "runs", tmp_path / "mine.py"
    file.write_text(f"open({str(runs)!r}, 'a').write('x')\n\ndef loss(pairs):\n    return pairs.chosen_logps\n")
    options = DPOOptions(loss_type=[f"{file}:loss"])
    assert [loss.name for loss, _ in options.own_losses + options.losses] == [f"{file}:loss"] * 2
    assert runs.read_text() == "x"
