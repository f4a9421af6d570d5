import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import wandb
from peft import LoraConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from tandem.data.options import DataOptions
from tandem.data.pairs import rendered
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.errors import UserError
from tandem.models.adapters import sort_config
from tandem.models.load import load_model, load_tokenizer
from tandem.models.merge import MergeOptions, merge
from tandem.models.scorer import Scorer
from tandem.options.losses import LOSSES
from tandem.options.model import ModelOptions, TextOptions
from tandem.runs import checkpoints, damage, is_complete, sha256_file, write_manifest
from tandem.training.session import added_callbacks
from tandem.training.trackers import wandb_place
from tests import tiny

ROOT = Path(__file__).parents[2]
LN2 = math.log(2)
Train = Callable[..., dict[str, Any]]


def arguments(model: Path, data: Path, out: Path, **flags: Any) -> list[str]:
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 2,
    }
    argv = []
    for name, value in (given | flags).items():
        values = value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def ref_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ref_cache")


@pytest.fixture(scope="module")
def train(script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, ref_cache: Path) -> Train:
    """`train("dpo", folder, flag=value, …)`: a run of the script in this process; its training_metrics.json."""

    def run(name: str, out: Path, **flags: Any) -> dict[str, Any]:
        if name == "dpo":
            flags = {"ref_cache": ref_cache} | flags
            if flags["ref_cache"] is None:  # of losses without a reference
                del flags["ref_cache"]
        model, data = flags.pop("model", tiny_model), flags.pop("data", tiny_data)
        script(name).main(arguments(model, data, out, **flags))
        return json.loads((out / "training_metrics.json").read_text())

    return run


def losses(metrics: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in metrics["log_history"] if "loss" in entry]


def weights(folder: Path) -> str:
    adapter = folder / "adapter_model.safetensors"
    return sha256_file(adapter if adapter.exists() else folder / "model.safetensors")


@pytest.mark.parametrize("use_peft", [True, False])
def test_dpo_begins_at_ln_2_and_learns(tmp_path: Path, train: Train, use_peft: bool, tiny_model: Path):
    metrics = train("dpo", tmp_path / "out", use_peft=use_peft, max_steps=16)
    assert losses(metrics)[0] == pytest.approx(LN2, abs=1e-6)
    assert losses(metrics)[-1] < 0.6
    assert is_complete(tmp_path / "out")
    trained = load_file(tmp_path / "out" / ("adapter_model.safetensors" if use_peft else "model.safetensors"))
    if use_peft:
        assert all("lora" in name for name in trained)
    else:
        before = load_file(tiny_model / "model.safetensors")
        assert all((trained[name] != before[name]).any() for name in before)
    load_model(ModelOptions(str(tmp_path / "out")))
    load_tokenizer(ModelOptions(str(tmp_path / "out")))


def scores(model: Path, data: Path, count: int) -> np.ndarray:
    """(count, 2) log-probs of the first training pairs."""
    source = ModelOptions(str(model))
    tokenizer = load_tokenizer(source)
    pairs = load_pairs(DataOptions(str(data)), "train")[:count]
    scorer = Scorer(load_model(source), tokenizer, batch_size=4, bf16=False)
    return scorer.pair_logps([tokenize_pair(render(pair, True), tokenizer) for pair in pairs], None)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_default_loss_with_smoothing_is_cdpo(
    tmp_path: Path, train: Train, tiny_model: Path, other_model: Path, tiny_data: Path, smoothing: float
):
    """One step on four pairs: (1 − ε)·(−log σ(βM)) + ε·(−log σ(−βM)), Mitchell 2023, from plain log-probs."""
    policy, reference = (scores(model, tiny_data, 4) for model in (tiny_model, other_model))
    margins = torch.tensor((policy - reference) @ [1.0, -1.0])
    assert margins.abs().min() > 0.01
    log_sigmoid = torch.nn.functional.logsigmoid
    beta = 3.0  # else every term is close to ln 2
    expected = -(1 - smoothing) * log_sigmoid(beta * margins) - smoothing * log_sigmoid(-beta * margins)
    metrics = train(
        "dpo",
        tmp_path / "out",
        max_steps=1,
        max_train_samples=4,
        beta=beta,
        label_smoothing=smoothing,
        reference_model=other_model,
    )
    assert losses(metrics) == pytest.approx([float(expected.mean())], abs=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_takes_a_step(tmp_path: Path, train: Train, other_model: Path, loss: str, tiny_model: Path):
    """Against another reference, so that margins are not zero; where smoothing is taken, it makes a difference."""
    steps = {}
    for smoothing in (0.1, 0.2) if LOSSES[loss].smoothed else (0.0,):
        out = tmp_path / str(smoothing)
        has_reference = LOSSES[loss].reference == "loss"
        against = {"reference_model": other_model, "beta": 1.0} if has_reference else {"ref_cache": None}
        common: dict[str, Any] = {"max_steps": 1, "max_train_samples": 4, "label_smoothing": smoothing}
        metrics = train("dpo", out, loss_type=loss, **common, **against)
        steps[smoothing] = losses(metrics)[0]
        assert math.isfinite(steps[smoothing])
        assert weights(out) != weights(tiny_model)
    assert len(set(steps.values())) == len(steps)


OWN_LOSS = """
import torch

def dpo(pairs):
    chosen, rejected = pairs.chosen_logps - pairs.ref_chosen_logps, pairs.rejected_logps - pairs.ref_rejected_logps
    return -torch.nn.functional.logsigmoid(pairs.beta * (chosen - rejected))

def bad(pairs):
    return pairs.chosen_logps.mean()
"""


def test_a_loss_of_the_users_own_is_trained(tmp_path: Path, train: Train, other_model: Path, script: Any):
    """DPO's own formula in a file gives TRL's losses and weights, alone and added to another, evaluation included."""
    (tmp_path / "mine.py").write_text(OWN_LOSS)
    common = {"reference_model": other_model, "beta": 1.0, "eval_strategy": "epoch", "num_train_epochs": 1}
    common |= {"max_steps": -1, "max_train_samples": 8}
    own = f"{tmp_path / 'mine.py'}:dpo"
    stock = train("dpo", tmp_path / "stock", **common)
    mine = train("dpo", tmp_path / "mine", loss_type=own, **common)
    assert losses(mine) == pytest.approx(losses(stock), abs=1e-6)
    evaluated = [[entry["eval_loss"] for entry in run["log_history"] if "eval_loss" in entry] for run in (stock, mine)]
    assert evaluated[0] and evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    both = train("dpo", tmp_path / "both", loss_type=["sigmoid", own], loss_weights=[0.5, 0.5], **common)
    assert losses(both) == pytest.approx(losses(stock), abs=1e-6)
    with pytest.raises(UserError, match="must give one value a pair"):
        train("dpo", tmp_path / "bad", loss_type=f"{tmp_path / 'mine.py'}:bad", **common)


@pytest.mark.parametrize("loss", ["simpo", "sft", "cpo"])
def test_without_a_reference_no_cache_is_opened(
    tmp_path: Path, train: Train, loss: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    train("dpo", tmp_path / "out", ref_cache=None, loss_type=loss, max_steps=1, max_train_samples=4)
    assert f"none: {loss} needs none" in (tmp_path / "out" / "train.log").read_text()
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_cache_that_nothing_is_read_from_is_refused(tmp_path: Path, train: Train):
    with pytest.raises(UserError, match="--ref_cache has no effect with --loss_type simpo cpo, which has no reference"):
        train("dpo", tmp_path / "out", loss_type=["simpo", "cpo"])


def test_simpo_is_its_formula(tmp_path: Path, train: Train, tiny_model: Path, tiny_data: Path):
    """One step on four pairs by Meng et al. 2024, Eq. 6, from plain log-probs."""
    tokenizer = load_tokenizer(ModelOptions(str(tiny_model)))
    rows = load_pairs(DataOptions(str(tiny_data)), "train")[:4]
    tokens = [tokenize_pair(render(row, True), tokenizer) for row in rows]
    lengths = torch.tensor([[len(pair[side]) for side in ("chosen_ids", "rejected_ids")] for pair in tokens])
    means = torch.tensor(scores(tiny_model, tiny_data, 4)) / lengths
    expected = -torch.nn.functional.logsigmoid(3.0 * (means[:, 0] - means[:, 1]) - 1.5)
    flags = {"loss_type": "simpo", "beta": 3.0, "simpo_gamma": 1.5, "max_steps": 1, "max_train_samples": 4}
    metrics = train("dpo", tmp_path / "out", ref_cache=None, **flags)
    assert losses(metrics) == pytest.approx([float(expected.mean())], abs=1e-4)
    logged = next(entry for entry in metrics["log_history"] if "rewards/margins" in entry)
    assert logged["rewards/margins"] == pytest.approx(float((3.0 * (means[:, 0] - means[:, 1])).mean()), abs=1e-4)


def test_weighted_losses_add_up(tmp_path: Path, train: Train, other_model: Path):
    steps: dict[str, Any] = {"max_steps": 1, "max_train_samples": 4}
    common = steps | {"reference_model": other_model, "beta": 1.0}
    one = losses(train("dpo", tmp_path / "sigmoid", loss_type="sigmoid", **common))[0]
    two = losses(train("dpo", tmp_path / "sft", loss_type="sft", ref_cache=None, **steps))[0]
    both = train("dpo", tmp_path / "both", loss_type=["sigmoid", "sft"], loss_weights=[0.5, 2.0], **common)
    assert losses(both)[0] == pytest.approx(0.5 * one + 2 * two, abs=1e-3)


def test_sft_learns_the_completion_only(tmp_path: Path, train: Train, tiny_model: Path, tiny_data: Path):
    """The first loss is the mean over tokens of chosen, end of sequence included, of one batch of all four pairs."""
    metrics = train("sft", tmp_path / "out", max_steps=1, max_train_samples=4)
    tokenizer = load_tokenizer(ModelOptions(str(tiny_model)))
    pairs = load_pairs(DataOptions(str(tiny_data)), "train")[:4]
    tokens = sum(len(tokenize_pair(render(pair, True), tokenizer)["chosen_ids"]) for pair in pairs)
    expected = -scores(tiny_model, tiny_data, 4)[:, 0].sum() / tokens
    assert losses(metrics)[0] == pytest.approx(expected, rel=1e-4)


def test_an_sft_adapter_is_the_reference_of_a_dpo_without_a_merge(tmp_path: Path, train: Train):
    sft, merged = tmp_path / "sft", tmp_path / "merged"
    train("sft", sft, use_peft=True, max_steps=8, learning_rate=1e-2)
    merge(MergeOptions(str(sft), str(merged)))
    on_adapter = train("dpo", tmp_path / "on_adapter", model=sft)
    on_merged = train("dpo", tmp_path / "on_merged", model=merged, use_peft=True)
    base = train("dpo", tmp_path / "base", use_peft=True)
    first, of_merged, of_base = (metrics["log_history"][0] for metrics in (on_adapter, on_merged, base))
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert of_merged["loss"] == pytest.approx(LN2, abs=1e-6)
    for name in ("logps/chosen", "logps/rejected"):
        assert first[name] == pytest.approx(of_merged[name], abs=1e-3)
        assert abs(first[name] - of_base[name]) > 0.1  # the SFT did something
    # What comes out is the SFT's adapter, trained on: one adapter, no frozen copy beside it
    names = {name for name in load_file(tmp_path / "on_adapter" / "adapter_model.safetensors") if "ref" in name}
    assert not names
    assert not (tmp_path / "on_adapter" / "ref").exists()
    assert weights(tmp_path / "on_adapter") != weights(sft)


def test_the_adapter_of_the_same_run_has_the_same_bytes_in_any_process(tmp_path: Path):
    """The order of a set of strings differs between processes, and PEFT saves one."""
    kept = set()
    for downwards in (False, True):
        config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
        config.save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        saved = json.loads(file.read_text())
        file.write_text(json.dumps(saved | {"target_modules": sorted(saved["target_modules"], reverse=downwards)}))
        sort_config(tmp_path)
        kept.add(file.read_bytes())
    assert len(kept) == 1


def test_options_are_saved_and_replay_the_run(
    tmp_path: Path, train: Train, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
):
    train("dpo", tmp_path / "out", use_peft=True, beta=0.3)
    config = str(tmp_path / "out" / "config.yaml")
    script("dpo").main(["--config", config, "--output_dir", str(tmp_path / "again")])
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["config"]["beta"] == 0.3
    assert run["versions"]["trl"] == "1.16.0"
    assert "step 2" in (tmp_path / "out" / "train.log").read_text()


def test_the_same_command_again_does_nothing_and_another_is_refused(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    train("dpo", out, use_peft=True)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    train("dpo", out, use_peft=True)
    train("dpo", out, use_peft=True, logging_steps=2)  # only how it is watched
    assert capsys.readouterr().err == f"{out}: already trained with these settings\n" * 2
    with pytest.raises(UserError) as error:
        train("dpo", out, use_peft=True, beta=0.5)
    assert str(error.value) == (
        f"--output_dir {out} holds a run with other settings (beta was 0.1, is 0.5): choose another folder, start over "
        "in this one with --resume_from_checkpoint no, or go on all the same with --allow_changed beta"
    )
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_an_option_that_came_later_strands_no_run(
    tmp_path: Path, train: Train, finished: bool, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    train("dpo", out, save_steps=1)
    run = json.loads((out / "run.json").read_text())
    for name in ("use_weighting", "simpo_gamma"):
        del run["config"][name]
    (out / "run.json").write_text(json.dumps(run))
    write_manifest(out)
    if not finished:
        (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="use_weighting was False, is True"):
        train("dpo", out, save_steps=1, use_weighting=True)
    capsys.readouterr()
    train("dpo", out, save_steps=1)
    assert ("already trained" in capsys.readouterr().err) == finished
    assert is_complete(out)


def test_starting_over_forgets_the_old_checkpoints(tmp_path: Path, train: Train):
    out = tmp_path / "out"
    train("dpo", out, use_peft=True, save_steps=1)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    train("dpo", out, use_peft=True, beta=0.5, resume_from_checkpoint="no", save_steps=500)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]  # the last step's own
    train("dpo", tmp_path / "fresh", use_peft=True, beta=0.5)
    assert weights(out) == weights(tmp_path / "fresh")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train("dpo", out, **LONG)
    return out


LONG: dict[str, Any] = {"max_steps": 40, "save_steps": 4, "save_total_limit": 10, "learning_rate": 1e-4}


def margins(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "logs" / "margins" / "margins_log.jsonl").read_text().splitlines()]
    return [{key: record.get(key) for key in ("step", "n", "mean", "p90", "tau")} for record in records]


def test_kill_9_and_the_same_command_again(
    tmp_path: Path, train: Train, undisturbed: Path, tiny_model: Path, tiny_data: Path, ref_cache: Path
):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "dpo.py")]
    command += arguments(tiny_model, tiny_data, out, ref_cache=ref_cache, **LONG)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (out / "checkpoint-8").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_complete(out)
    metrics = train("dpo", out, **LONG)
    assert weights(out) == weights(undisturbed)
    assert margins(out) == margins(undisturbed)
    assert (
        metrics["log_history"][-2]["loss"]
        == json.loads((undisturbed / "training_metrics.json").read_text())["log_history"][-2]["loss"]
    )


def test_sigterm_saves_and_says_that_it_can_be_resumed(
    tmp_path: Path, train: Train, undisturbed: Path, tiny_model: Path, tiny_data: Path, ref_cache: Path
):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tandem.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
    command += [str(ROOT / "scripts" / "dpo.py")]
    command += arguments(tiny_model, tiny_data, out, ref_cache=ref_cache, **LONG | {"save_steps": 1000})
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (out / "logs" / "margins" / "margins_log.jsonl").exists():
        assert launcher.poll() is None
        time.sleep(0.002)
    (trainer,) = psutil.Process(launcher.pid).children()
    trainer.terminate()
    _, screen = launcher.communicate()
    assert launcher.returncode == 75, screen
    (checkpoint,) = out.glob("checkpoint-*")
    assert is_complete(checkpoint) and not is_complete(out)
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"Preempted: stopped by SIGTERM after step {step}; the same command goes on there" in screen
    train("dpo", out, **LONG | {"save_steps": 1000})
    assert weights(out) == weights(undisturbed)
    assert margins(out) == margins(undisturbed)


def cut_off(undisturbed: Path, out: Path) -> Path:
    """The run as a kill after step 36 leaves it."""
    shutil.copytree(undisturbed, out)
    (out / "manifest.json").unlink()
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-40")
    return out


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("no manifest", "it has no manifest: its writing was cut off"),
        ("file cut", "optimizer.pt has 100 bytes, not "),
        ("file gone", "model.safetensors is missing"),
        ("a bit flipped", "the content of model.safetensors has changed"),
        ("another run's", "another run made it (abc)"),
    ],
)
def test_a_bad_checkpoint_is_passed_over(tmp_path: Path, train: Train, undisturbed: Path, harm: str, told: str):
    out = cut_off(undisturbed, tmp_path / "out")
    bad = out / "checkpoint-36"
    match harm:
        case "no manifest":
            (bad / "manifest.json").unlink()
        case "file cut":
            os.truncate(bad / "optimizer.pt", 100)
        case "file gone":
            (bad / "model.safetensors").unlink()
        case "a bit flipped":
            content = bytearray((bad / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (bad / "model.safetensors").write_bytes(content)
        case "another run's":
            run = json.loads((bad / "run.json").read_text()) | {"id": "abc"}
            (bad / "run.json").write_text(json.dumps(run))
            write_manifest(bad)
    train("dpo", out, **LONG)
    assert weights(out) == weights(undisturbed)
    assert margins(out) == margins(undisturbed)
    log = (out / "train.log").read_text()
    assert f"{bad} is skipped: {told}" in log
    assert f"resuming from {out / 'checkpoint-32'}" in log
    # What was never finished is gone; what was once good, or is someone else's, is still there
    assert (out / "skipped_checkpoint-36").exists() == (harm != "no manifest")
    assert damage(bad) is None


def test_the_last_good_checkpoint_is_kept_while_later_ones_are_bad(tmp_path: Path, train: Train, undisturbed: Path):
    """Two bad ones and a limit of one: the good one goes only when there is another good one."""
    out = cut_off(undisturbed, tmp_path / "out")
    for step in (28, 36):
        os.truncate(out / f"checkpoint-{step}" / "optimizer.pt", 100)
    options = LONG | {"save_total_limit": 1}
    kept: list[list[str]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept.append([path.name for path in checkpoints(out) if damage(path) is None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.training.session.RateProgress", lambda unit: Watch())
        train("dpo", out, **options)
    assert all(kept)
    assert "checkpoint-32" in kept[3] and kept[4] == ["checkpoint-36"]
    assert [path.name for path in checkpoints(out) if damage(path) is None] == ["checkpoint-40"]
    assert weights(out) == weights(undisturbed)


def test_changed_settings_are_named_and_may_be_allowed(tmp_path: Path, train: Train, undisturbed: Path):
    out = cut_off(undisturbed, tmp_path / "out")
    changed = LONG | {"max_grad_norm": 0.5, "per_device_train_batch_size": 2, "save_total_limit": 4}
    before = tree(out)
    for allowed, refused in (
        ([], "per_device_train_batch_size max_grad_norm"),
        (["max_grad_norm"], "per_device_train_batch_size"),
    ):
        flags = changed | ({"allow_changed": allowed} if allowed else {})
        with pytest.raises(UserError, match=f"go on all the same with --allow_changed {refused}$") as error:
            train("dpo", out, **flags)
        assert ("max_grad_norm was 1.0, is 0.5" in str(error.value)) == (not allowed)
    with pytest.raises(UserError, match="--allow_changed nonsense: there is no such setting"):
        train("dpo", out, **LONG, allow_changed="nonsense")
    with pytest.raises(UserError, match="--allow_changed learning_rate: the optimizer's state in a checkpoint brings"):
        train("dpo", out, **LONG | {"learning_rate": 1e-3}, allow_changed="learning_rate")
    data = tiny.save_pairs(tmp_path / "train.jsonl", tiny.hh_rows(31))
    with pytest.raises(UserError, match=r"data was \w+, is \w+\): choose"):
        train("dpo", out, data=data, **LONG, allow_changed="dataset_name")
    assert {name: digest for name, digest in tree(out).items() if name != "train.log"} == {
        name: digest for name, digest in before.items() if name != "train.log"
    }
    train("dpo", out, **changed, allow_changed=["max_grad_norm", "per_device_train_batch_size"])
    log = (out / "train.log").read_text()
    assert (
        "resuming with changed settings: per_device_train_batch_size was 4, is 2; max_grad_norm was 1.0, is 0.5" in log
    )
    assert weights(out) != weights(undisturbed)


def test_a_finished_run_goes_on_when_more_steps_are_allowed(tmp_path: Path, train: Train):
    out = tmp_path / "out"
    train("dpo", out, max_steps=2)
    metrics = train("dpo", out, max_steps=4, allow_changed="max_steps")
    assert [entry["step"] for entry in metrics["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert is_complete(out)


def test_logs_of_a_resumed_run_are_those_of_one_never_stopped(tmp_path: Path, train: Train):
    """Checkpoints between two logs: averages over the interval, token counts and the mean of all losses."""

    class Stop(Exception):
        sort_config(tmp_path)

    class StopAt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise Stop

    def comparable(metrics: dict[str, Any]) -> list[dict[str, Any]]:
        clocks = ("runtime", "per_second", "system/", "total_flos")
        return [
            {name: value for name, value in entry.items() if not any(clock in name for clock in clocks)}
            for entry in metrics["log_history"]
        ]

    for name in ("sft", "dpo"):
        options: dict[str, Any] = {"max_steps": 8, "logging_steps": 3, "save_steps": 4}
        straight = train(name, tmp_path / f"{name}_straight", **options)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr("tandem.training.session.RateProgress", lambda unit: StopAt())
            train(name, tmp_path / name, **options)
        resumed = train(name, tmp_path / name, **options)
        assert [entry["step"] for entry in resumed["log_history"]] == [3, 6, 8]
        assert all(entry["system/rank_0/allocated_gib"] > 0 for entry in resumed["log_history"][:2])
        assert comparable(resumed) == [pytest.approx(entry, rel=1e-12) for entry in comparable(straight)]


def test_a_named_checkpoint(tmp_path: Path, train: Train, undisturbed: Path):
    with pytest.raises(UserError, match=r"max_grad_norm was 1\.0, is 0\.5"):
        flags = LONG | {"max_grad_norm": 0.5}
        train("dpo", tmp_path / "bad", resume_from_checkpoint=undisturbed / "checkpoint-36", **flags)
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {tmp_path}: not a complete checkpoint"):
        train("dpo", tmp_path / "bad", resume_from_checkpoint=tmp_path, **LONG)
    train("dpo", tmp_path / "out", resume_from_checkpoint=undisturbed / "checkpoint-36", **LONG)
    assert weights(tmp_path / "out") == weights(undisturbed)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_the_mirror_is_a_copy(tmp_path: Path, train: Train):
    out, mount = tmp_path / "out", tmp_path / "mount"
    train("dpo", out, use_peft=True, max_steps=4, save_steps=1, save_total_limit=2, mount_dir=mount)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    mirrored = tree(mount / "out")
    assert mirrored.keys() == tree(out).keys()
    assert {name for name in mirrored if mirrored[name] != tree(out)[name]} <= {"train.log"}
    assert is_complete(mount / "out" / "checkpoint-4")
    assert is_complete(mount / "out")
    # Another run in the same folder, with files of the same sizes, replaces the copies
    train("dpo", out, use_peft=True, max_steps=4, beta=0.5, mount_dir=mount, resume_from_checkpoint="no")
    assert weights(mount / "out") == weights(out)
    assert {path.name for path in (mount / "out").glob("checkpoint-*")} == {"checkpoint-4"}


def test_a_save_is_mirrored_at_once(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch):
    """A machine lost after a save loses nothing: the mirror has the checkpoint before the next step."""
    from tandem.training.trainers.trl import TandemDPOTrainer

    step = TandemDPOTrainer.training_step

    def lost(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("machine lost")
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(TandemDPOTrainer, "training_step", lost)
    with pytest.raises(RuntimeError, match="machine lost"):
        train("dpo", tmp_path / "out", max_steps=4, save_steps=2, mount_dir=tmp_path / "mount")
    assert is_complete(tmp_path / "mount" / "out" / "checkpoint-2")


def test_debug_is_short_and_loud(tmp_path: Path, train: Train, script: Callable[[str], ModuleType], tiny_model: Path):
    data = tiny.save_pairs(tmp_path / "train.jsonl", tiny.hh_rows(50))
    argv = arguments(tiny_model, data, tmp_path / "out", debug="true", ref_cache=tmp_path, logging_steps=10)
    del argv[argv.index("--max_steps") : argv.index("--max_steps") + 2]
    script("dpo").main(argv)
    metrics = json.loads((tmp_path / "out" / "training_metrics.json").read_text())
    assert len(losses(metrics)) == 4
    assert "reference of train pairs: 0 of 32" in (tmp_path / "out" / "train.log").read_text()
    assert (tmp_path / "log_probs.sqlite").is_file()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_evaluation_while_training(tmp_path: Path, train: Train):
    metrics = train("dpo", tmp_path / "out", max_steps=4, eval_strategy="steps", eval_steps=2, max_eval_samples=5)
    evaluated = [entry for entry in metrics["log_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    data = tiny.save_pairs(tmp_path / "only_train.jsonl", tiny.hh_rows(4))
    with pytest.raises(UserError, match="--eval_strategy needs held-out pairs: a test split, or --val_ratio"):
        train("dpo", tmp_path / "none", data=data, eval_strategy="epoch")


def test_prompts_lose_their_oldest_turns():
    tokenizer = tiny.tokenizer()
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), "abc", strict=True)]
    pair = {"prompt": turns, "chosen": [{"role": "assistant", "content": "d"}], "rejected": turns[1:2], "pair_id": "1"}
    for use_chat_template, limit, cut in ((True, 9, turns[2:]), (False, 25, "\n\nHuman: c\n\nAssistant:")):
        text = TextOptions(use_chat_template=use_chat_template, max_prompt_length=limit)
        assert rendered(pair, text, tokenizer)["prompt"] == cut


def test_pairs_that_lose_their_answers(tmp_path: Path, train: Train, tiny_data: Path):
    train("dpo", tmp_path / "out", max_length=25)
    assert "pairs left out: the prompt alone fills --max_length" in (tmp_path / "out" / "train.log").read_text()
    with pytest.raises(UserError, match="--max_length 4: no pair keeps any of its answers"):
        train("dpo", tmp_path / "none", max_length=4)


def test_a_model_without_a_template_trains(tmp_path: Path, train: Train):
    model = tiny.save_model(tmp_path / "model", chat_template=None)
    train("dpo", tmp_path / "out", model=model)
    assert "has no chat template: using 'plain'" in (tmp_path / "out" / "train.log").read_text()
    assert "Human: " in load_tokenizer(ModelOptions(str(tmp_path / "out"))).chat_template


def test_a_run_leaves_its_process_as_it_was(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch):
    """Else what comes after it there, such as DPO after SFT, would log into its files and run with its settings."""

    def state() -> dict[str, Any]:
        loggers = {name: logging.getLogger(name) for name in ("tandem", "transformers")}
        return {
            "environment": sorted(os.environ.items()),
            "filters": list(warnings.filters),
            "loggers": {name: (one.level, one.propagate, list(one.handlers)) for name, one in loggers.items()},
            "wandb": wandb.run,
        }

    monkeypatch.setenv("WANDB_SILENT", "true")
    train("sft", tmp_path / "warm", report_to=["wandb"])  # what libraries set when they are first used is theirs
    before = state()
    train("sft", tmp_path / "sft", report_to=["wandb"])
    assert state() == before
    log = (tmp_path / "sft" / "train.log").read_text()
    with added_callbacks(Killed()), pytest.raises(KeyboardInterrupt):
        train("dpo", tmp_path / "dpo")
    assert state() == before
    assert "reference of train pairs" in (tmp_path / "dpo" / "train.log").read_text()
    assert (tmp_path / "sft" / "train.log").read_text() == log
    train("dpo", tmp_path / "dpo")  # nobody's callback any more
    assert "layout shared" in (tmp_path / "dpo" / "train.log").read_text().split("resuming")[-1]


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise KeyboardInterrupt


def test_trackers_write_without_key_or_network(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("dpo", tmp_path / "out", report_to=["wandb", "tensorboard"], run_name="tiny", wandb_project="mine")
    assert wandb.run is None
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert len(content) > 1000 and b"mine" in content
    events = list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert len(events) == 1
    accumulator = EventAccumulator(str(events[0]))
    accumulator.Reload()
    logged = accumulator.Scalars("train/loss")
    assert [event.step for event in logged] == [1, 2]
    assert logged[0].value == pytest.approx(LN2, abs=1e-6)


def test_progress_shows_rates(tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]):
    train("dpo", tmp_path / "out")
    bar = capsys.readouterr().err
    assert "pairs/s=" in bar
    assert "tokens/s=" in bar


@pytest.mark.parametrize(
    ("netrc", "mode"),
    [
        ("", "offline"),
        ("machine api.wandb.ai login user password secret", None),
        ("machine x login y password z", "offline"),
    ],
)
def test_wandb_without_a_key_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, netrc: str, mode: str | None
):
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert wandb_place(tmp_path) == {"dir": str(tmp_path)} | ({"mode": mode} if mode else {})
    assert "secret" not in caplog.text
