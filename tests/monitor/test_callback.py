"""The monitor inside TRL's real training loop."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tandem.errors import AlarmStop, UserError
from tandem.monitor.gather import MicroBatch
from tandem.monitor.margins import read_margins, read_margins_log
from tandem.monitor.options import MonitorOptions
from tandem.monitor.saved import saved_state
from tandem.runs import read_jsonl
from tests.monitor.monitored import MonitoredTrainer

# δ = 0.4 of 4 pairs a step: some tests fail, some do not
OPTIONS = {"tail_delta": 0.4, "tail_warmup_steps": 3, "tail_ema": 0.1, "beta_control": "risk", "beta_alpha": 0.2}


def options(**changes: object) -> MonitorOptions:
    return MonitorOptions(**(OPTIONS | changes))  # type: ignore[arg-type]


def logged(folder: Path) -> dict[str, bytes]:
    """Every file of the margins folder."""
    root = folder / "logs" / "margins"
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> MonitoredTrainer:
    """12 steps in 2 epochs of 22 pairs; each epoch's last step has one micro-batch of 2 pairs.

    A log every 3 steps and a checkpoint every 4, so that checkpoints lie between logs.
    """
    trainer = MonitoredTrainer(tmp_path_factory.mktemp("whole"), options())
    trainer.train()
    return trainer


def test_every_pair_once_an_epoch(whole: MonitoredTrainer) -> None:
    folder = Path(whole.args.output_dir) / "logs" / "margins"
    steps, events = read_margins_log(folder)
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["epoch"] for r in steps] == [1] * 6 + [2] * 6
    assert [r["n"] for r in steps] == [4, 4, 4, 4, 4, 2] * 2
    for epoch in (1, 2):
        arrays = [read_margins(folder / r["npy"]) for r in steps if r["epoch"] == epoch]
        assert sorted(np.concatenate(arrays)["pair_id"]) == [f"p{i:02d}" for i in range(22)]
    assert [(e["event"], e["step"], e["tau0"]) for e in events] == [("warmup_end", 3, steps[2]["tau"])]
    assert [r["p_hat"] is None for r in steps] == [True] * 3 + [False] * 9


def test_margins_are_those_trl_computes(whole: MonitoredTrainer) -> None:
    # With β fixed until step 4, TRL's logged reward margin is β times the mean over the three steps of an interval
    steps, _ = read_margins_log(Path(whole.args.output_dir) / "logs" / "margins")
    trl = {log["step"]: log["rewards/margins"] for log in whole.state.log_history if "rewards/margins" in log}
    assert steps[0]["max"] == steps[0]["min"] == 0  # the policy is the reference before its first step
    assert trl[3] == pytest.approx(0.1 * sum(r["mean"] for r in steps[:3]) / 3, abs=1e-6)
    assert trl[3] != 0


def test_beta_of_the_trainer_follows_the_control(whole: MonitoredTrainer) -> None:
    steps, _ = read_margins_log(Path(whole.args.output_dir) / "logs" / "margins")
    betas = [r["beta"] for r in steps]
    assert betas[:4] == [0.1] * 4
    for before, after in itertools.pairwise(steps[3:]):
        u = (before["p_hat"] - 0.4) / math.sqrt(0.4 * 0.6 / before["n"])
        assert after["beta"] == pytest.approx(before["beta"] * math.exp(0.2 * math.tanh(0.5 * u)))
    assert whole.beta == whole.monitor.beta != 0.1


def test_trackers_get_the_tail_and_the_system(whole: MonitoredTrainer) -> None:
    logs = [log for log in whole.state.log_history if "loss" in log]
    steps, _ = read_margins_log(Path(whole.args.output_dir) / "logs" / "margins")
    assert [log["step"] for log in logs] == [3, 6, 9, 12]
    for log in logs:
        record = steps[log["step"] - 1]
        for name in ("mean", "p90", "tau", "p_hat", "beta", "over"):
            assert log.get(f"tail/{name}") == record[name]
        assert log["system/rank_0/pairs_per_second"] > 0
        assert log["system/rank_0/tokens_per_second"] > log["system/rank_0/pairs_per_second"]
        assert 0.05 < log["system/rank_0/allocated_gib"] <= log["system/rank_0/peak_gib"] < 8
    assert [log["step"] for log in logs if "tail/tau0" in log] == [3]
    assert logs[-1]["tail/failures"] == sum(bool(r["over"]) for r in steps)


@pytest.mark.parametrize("die_in", [3, 7, 10])
def test_a_killed_run_resumes_to_the_same_logs(whole: MonitoredTrainer, tmp_path: Path, die_in: int) -> None:
    # Checkpoints at 4 and 8: 3 starts over, 7 and 10 resume in mid-epoch with steps logged beyond the checkpoint
    killed = MonitoredTrainer(tmp_path, options(), die_in=die_in)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    killed.monitor._margins_log.flush()  # a real kill would have ended its thread as well
    log = tmp_path / "logs" / "margins" / "margins_log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"epoch": 1, "st')  # torn by the kill
    trainer = MonitoredTrainer(tmp_path, options())
    if die_in > 4:
        trainer.resume(tmp_path / f"checkpoint-{(die_in - 1) // 4 * 4}")
    else:
        trainer.train()
    assert logged(tmp_path) == logged(Path(whole.args.output_dir))
    assert trainer.monitor.state == whole.monitor.state
    assert trainer.beta == whole.beta
    for checkpoint in Path(whole.args.output_dir).glob("checkpoint-*"):
        ours, theirs = (saved_state(folder / checkpoint.name) for folder in (tmp_path, checkpoint.parent))
        assert ours == theirs
    weights = zip(trainer.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(resumed, uninterrupted) for resumed, uninterrupted in weights)


def test_an_injected_nan_stops_in_its_step(tmp_path: Path, whole: MonitoredTrainer) -> None:
    arrays = [read_margins(file) for file in sorted(Path(whole.args.output_dir).glob("logs/margins/epoch_001/*.npy"))]
    bad = str(arrays[4]["pair_id"][2])  # a pair of step 5, in its second micro-batch
    trainer = MonitoredTrainer(tmp_path, options(), poison=(bad,), save_steps=3)
    with pytest.raises(
        AlarmStop, match=rf"stopped in step 5: margin is nan \(pairs {bad}\); saved a checkpoint of step 4"
    ):
        trainer.train()

    (alarm,) = read_jsonl(tmp_path / "logs" / "alarms.jsonl")
    assert (alarm["step"], alarm["alarm"], alarm["action"], alarm["value"]) == (5, "nonfinite", "stop", "nan")
    assert alarm["pair_ids"] == [bad]
    (batch,) = alarm["batches"]
    with safe_open(tmp_path / "logs" / batch, "pt") as file:
        assert bad in json.loads(file.metadata()["pair_ids"])
        assert set(file.keys()) == {"input_ids", "attention_mask", "completion_mask"}
    assert len(read_margins_log(tmp_path / "logs" / "margins")[0]) == 4

    # Without the poison, the alarm's checkpoint goes on to the end as if nothing had happened
    healed = MonitoredTrainer(tmp_path, options())
    healed.resume(tmp_path / "checkpoint-4")
    assert logged(tmp_path) == logged(Path(whole.args.output_dir))
    assert len(read_jsonl(tmp_path / "logs" / "alarms.jsonl")) == 1


def test_a_good_checkpoint_is_not_written_again(tmp_path: Path, whole: MonitoredTrainer) -> None:
    arrays = [read_margins(file) for file in sorted(Path(whole.args.output_dir).glob("logs/margins/epoch_001/*.npy"))]
    trainer = MonitoredTrainer(tmp_path, options(), poison=(str(arrays[4]["pair_id"][0]),))
    with pytest.raises(AlarmStop, match="the checkpoint of step 4 is good"):
        trainer.train()
    written = (tmp_path / "checkpoint-4" / "model.safetensors").stat().st_mtime
    assert written <= (tmp_path / "logs" / "alarms.jsonl").stat().st_mtime


def test_a_nan_in_the_first_step_has_nothing_to_save(tmp_path: Path, whole: MonitoredTrainer) -> None:
    array = read_margins(Path(whole.args.output_dir) / "logs/margins/epoch_001/step_00001.npy")
    trainer = MonitoredTrainer(tmp_path, options(), poison=(str(array["pair_id"][0]),))
    with pytest.raises(AlarmStop, match="nothing to save"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


class BrokenTrainer(MonitoredTrainer):
    """`broken` says what goes bad in step 8, of which a checkpoint is due."""

    broken = ""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: object = None) -> object:
        if self.broken == "gradient" and self.state.global_step == 7:
            grad_norm = torch.tensor(math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def _maybe_log_save_evaluate(self, *args: object, **kwargs: object) -> None:
        if self.broken == "weight" and self.state.global_step == 8:
            next(self.model.parameters()).data.fill_(math.nan)
        super()._maybe_log_save_evaluate(*args, **kwargs)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("gradient", r"in step 8: gradient norm is inf \(pairs .* and 1 more\); saved a checkpoint of step 7"),
        ("weight", "after step 8: trainable weights are not finite; no checkpoint"),
    ],
)
def test_bad_weights_never_replace_a_good_checkpoint(tmp_path: Path, broken: str, message: str) -> None:
    trainer = BrokenTrainer(tmp_path, options(), save_total_limit=1)
    trainer.broken = broken
    with pytest.raises(AlarmStop, match=message):
        trainer.train()
    (kept,) = tmp_path.glob("checkpoint-*")
    assert kept.name == {"gradient": "checkpoint-7", "weight": "checkpoint-4"}[broken]
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())


def test_nan_weights_stop_without_a_checkpoint_of_them(tmp_path: Path) -> None:
    trainer = BrokenTrainer(tmp_path, options(), save_steps=3)
    trainer.broken = "weight"  # noticed by the loss of step 9, between checkpoints
    with pytest.raises(AlarmStop, match=r"in step 9: .* no checkpoint was saved: the last one is good"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_warn_goes_on(tmp_path: Path) -> None:
    trainer = MonitoredTrainer(tmp_path, options(alarm_nonfinite="warn"), poison=("p00",), max_steps=6, save_steps=100)
    trainer.train()
    alarms = read_jsonl(tmp_path / "logs" / "alarms.jsonl")
    assert {alarm["action"] for alarm in alarms} == {"warn"}
    assert len(read_margins_log(tmp_path / "logs" / "margins")[0]) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"alarm_grad_spike": "stop", "alarm_grad_spike_factor": 1.01},
        {"alarm_accuracy_pinned": "stop", "alarm_accuracy_pinned_logs": 3, "alarm_accuracy_pinned_within": 0.2},
        {"alarm_chosen_falling": "stop", "alarm_chosen_falling_logs": 1},
        {"alarm_kl": "stop", "alarm_kl_max": 1e-4},
        {"alarm_stuck": "stop", "alarm_stuck_steps": 2},
    ],
)
def test_other_alarms_stop_after_a_checkpoint(tmp_path: Path, changes: dict[str, object]) -> None:
    trainer = MonitoredTrainer(tmp_path, options(**changes), save_steps=100, num_train_epochs=4, logging_steps=1)
    with pytest.raises(AlarmStop, match=r"stopped after step \d+: .*; saved a checkpoint of step"):
        trainer.train()
    stop = next(alarm for alarm in read_jsonl(tmp_path / "logs" / "alarms.jsonl") if alarm["action"] == "stop")
    assert f"alarm_{stop['alarm']}" in changes
    checkpoint = tmp_path / f"checkpoint-{stop['step']}"
    assert trainer.state.global_step == stop["step"] < 24
    assert saved_state(checkpoint)["step"] == stop["step"]


def test_goes_on_from_a_checkpoint_of_an_older_tandem(whole: MonitoredTrainer, tmp_path: Path) -> None:
    """Whose state is in a file of its own, and unknown to transformers; what is saved next has it in the new place."""
    checkpoint = shutil.copytree(Path(whole.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer_state = json.loads((checkpoint / "trainer_state.json").read_text())
    older = trainer_state["stateful_callbacks"].pop("MonitorCallback")["attributes"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(trainer_state))
    (checkpoint / "tail_monitor.json").write_text(json.dumps(older))
    trainer = MonitoredTrainer(tmp_path, options())
    trainer.resume(checkpoint)
    assert trainer.monitor.state == whole.monitor.state
    assert saved_state(tmp_path / "checkpoint-8") == saved_state(Path(whole.args.output_dir) / "checkpoint-8")
    assert not (tmp_path / "checkpoint-8" / "tail_monitor.json").exists()


def test_refuses_a_checkpoint_it_cannot_go_on_from(whole: MonitoredTrainer, tmp_path: Path) -> None:
    checkpoint = Path(whole.args.output_dir) / "checkpoint-4"
    trainer = MonitoredTrainer(tmp_path, options(tail_delta=0.3))
    with pytest.raises(UserError, match=r"--tail_delta 0.3 differs from the 0.4"):
        trainer.monitor.load(checkpoint)
    with pytest.raises(UserError, match=r"--beta 0.2 differs from the 0.1"):
        MonitoredTrainer(tmp_path, options(), beta=0.2).monitor.load(checkpoint)
    with pytest.raises(UserError, match="no tail monitor state"):
        trainer.monitor.load(tmp_path)
    with pytest.raises(RuntimeError, match="begins at step 4, the monitor's state is of step 0"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(UserError, match=r"--beta 0.001 is outside"):
        MonitoredTrainer(tmp_path, options(), beta=0.001)


def test_mismatched_pair_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="1 pair ids for margins of shape"):
        MicroBatch.of(["a"], torch.zeros(2), (torch.zeros(2), torch.zeros(2)), torch.zeros(()))
