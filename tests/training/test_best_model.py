"""The best of the evaluations: which checkpoint is kept, which weights are saved, and when a run stops for it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tandem.errors import UserError

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
