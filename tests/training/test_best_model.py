"""The best of the evaluations: which checkpoint is kept, which weights are saved, and when a run stops for it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tandem.errors import UserError
from tandem.runs import MANIFEST
from tests import tiny

# With so high a learning rate the held-out answers' rewards fall, while their loss gets better
METRIC = "eval_rewards/chosen"
HOT = "--learning_rate 0.05 --max_steps 6 --logging_steps 1 --eval_strategy steps --eval_steps 1"


def run(script, folder: Path, model: Path, data: Path, *flags: str) -> list[dict[str, float]]:
    """What a run of dpo.py logged."""
    given = f"--model_name_or_path {model} --dataset_name {data} --output_dir {folder} --ref_cache {folder}_cache {HOT}"
    script("dpo").main([*given.split(), "--per_device_train_batch_size", "4", *flags])
    history: list[dict[str, float]] = json.loads((folder / "training_metrics.json").read_text())["log_history"]
    return history


def measured_in(history: list[dict[str, float]]) -> dict[float, float]:
    return {log["step"]: log[METRIC] for log in history if METRIC in log}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_model_saved_is_the_best(adapter: bool, tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    flags = "--save_strategy steps --save_steps 1 --save_total_limit 1 --load_best_model_at_end"
    flags += f" --metric_for_best_model {METRIC} --use_peft {adapter}"
    history = run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split())
    measured = measured_in(history)
    best = max(measured, key=lambda step: measured[step])
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{best}"]
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    saved, at_best = (
        load_file(folder / name) for folder in (tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
    )
    assert saved.keys() == at_best.keys()
    assert all(saved[key].equal(at_best[key]) for key in saved)
    assert best != 6, "else the test could not fail"


def test_only_the_best_is_a_checkpoint(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    flags = f"--save_strategy best --save_total_limit none --metric_for_best_model {METRIC}"
    history = run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split())
    measured = measured_in(history)
    better = [step for step in measured if all(measured[step] > measured[other] for other in measured if other < step)]
    assert {int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*")} == set(better)


def test_early_stopping(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    whole = measured_in(run(script, tmp_path / "whole", tiny_model, tiny_data))
    flags = f"--early_stopping_patience 2 --metric_for_best_model {METRIC}"
    measured = measured_in(run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split()))
    best = max(measured, key=lambda step: measured[step])
    assert max(measured) == best + 2 < max(whole)
    assert measured == {step: whole[step] for step in measured}


def test_early_stopping_over_a_kill(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    """The evaluations before the kill count: the run stops where one that was never stopped does."""
    flags = f"--early_stopping_patience 2 --metric_for_best_model {METRIC} --save_steps 1 --save_total_limit none"
    measured = measured_in(run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split()))
    last = max(measured)
    (tmp_path / "out" / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{last}")
    again = run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split())
    assert measured_in(again) == measured and max(log["step"] for log in again) == last < 6


def test_several_sets(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    """Each is measured as it is alone; the best model and the stop are by the one that was named."""
    other = tiny.save_pairs(tmp_path / "other.jsonl", tiny.hh_rows(5, start=50))
    sets = ["--eval_sets", f"own={tiny_data}", f"other={other}"]
    flags = ["--metric_for_best_model", "eval_other_rewards/chosen", "--early_stopping_patience", "2"]
    flags += ["--save_steps", "1", "--load_best_model_at_end", "--save_strategy", "steps", "--save_total_limit", "none"]
    history = run(script, tmp_path / "out", tiny_model, tiny_data, *sets, *flags)
    alone = {
        "own": run(script, tmp_path / "own", tiny_model, tiny_data),
        "other": run(script, tmp_path / "alone", tiny_model, tiny_data, "--eval_sets", f"other={other}"),
    }
    for name, prefix in (("own", "eval_"), ("other", "eval_other_")):
        of_one = {log["step"]: log[f"{prefix}loss"] for log in alone[name] if f"{prefix}loss" in log}
        found = {log["step"]: log[f"eval_{name}_loss"] for log in history if f"eval_{name}_loss" in log}
        assert len(found) > 2 and found == {step: of_one[step] for step in found}
    by_step = {log["step"]: log["eval_other_rewards/chosen"] for log in history if "eval_other_rewards/chosen" in log}
    best = max(by_step, key=lambda step: by_step[step])
    assert max(by_step) == best + 2 < 6
    saved, at_best = (
        load_file(f / "model.safetensors") for f in (tmp_path / "out", tmp_path / f"out/checkpoint-{best}")
    )
    assert all(saved[key].equal(at_best[key]) for key in saved)
    assert not any("eval_loss" in log for log in history)


def test_sets_of_an_sft(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    given = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {tmp_path}/out --max_steps 1"
    script("sft").main([*given.split(), "--eval_strategy", "epoch", "--eval_sets", f"a={tiny_data}", f"b={tiny_data}"])
    history = json.loads((tmp_path / "out" / "training_metrics.json").read_text())["log_history"]
    (found,) = [log for log in history if "eval_a_loss" in log]
    assert [log["eval_b_loss"] for log in history if "eval_b_loss" in log] == [found["eval_a_loss"]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--eval_sets a", "--eval_sets a: must be NAME=DATA"),
        ("--eval_sets a=x a=y", "a name is there twice"),
        ("--eval_sets a=x --val_ratio 0.1", "--val_ratio has no effect with --eval_sets"),
        ("--eval_sets a=x --save_strategy best", "must be of one of --eval_sets, as eval_a_loss"),
        ("--eval_sets a=./nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_sets_that_cannot_be(flags: str, told: str, tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    with pytest.raises(UserError, match=told):
        run(script, tmp_path / "out", tiny_model, tiny_data, *flags.split())


def test_a_metric_that_no_evaluation_has(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    with pytest.raises(UserError, match=r"--metric_for_best_model bleu: an evaluation has .*eval_loss"):
        run(
            script,
            tmp_path / "out",
            tiny_model,
            tiny_data,
            "--save_strategy",
            "best",
            "--metric_for_best_model",
            "bleu",
        )


def test_a_share_of_all_steps(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    run(script, tmp_path / "out", tiny_model, tiny_data, "--save_strategy", "steps", "--save_steps", "0.5")
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_experts_where_there_are_none(tmp_path: Path, script, tiny_model: Path, tiny_data: Path):
    with pytest.raises(UserError, match="--router_aux_loss_coef has no effect: the model has no experts"):
        run(script, tmp_path / "out", tiny_model, tiny_data, "--router_aux_loss_coef", "0.1")
