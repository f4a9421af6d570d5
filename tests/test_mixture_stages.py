"""A mixture of sources in the place of a data file, through every stage that reads pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from tests import tiny


def test_a_mixture_is_data_like_any_other(
    tmp_path: Path, script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path
):
    rows = [{"q": f"say {index}", "good": "yes yes", "bad": "no"} for index in range(12)]
    tiny.save_pairs(tmp_path / "own.jsonl", rows)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        f"- {{dataset_name: {tiny_data}/train.jsonl, weight: 2}}\n"
        "- {dataset_name: own.jsonl, prompt_key: q, chosen_key: good, rejected_key: bad}\n"
    )
    data = ["--dataset_name", str(mixture), "--val_ratio", "0.25"]
    model = ["--model_name_or_path", str(tiny_model)]
    train = ["--max_steps", "1", "--per_device_train_batch_size", "8", "--eval_strategy", "epoch"]
    script("check_data").main([*data, "--report", str(tmp_path / "data_report.json")])
    script("sft").main([*data, *model, *train, "--output_dir", str(tmp_path / "sft")])
    script("dpo").main(
        [*data, *model, *train, "--output_dir", str(tmp_path / "dpo"), "--ref_cache", str(tmp_path / "c")]
    )
    scored = ["--reference_model", str(tiny_model), "--dpo_model", str(tmp_path / "dpo"), "--kl_prompts", "0"]
    script("evaluate").main([*data, *scored, "--output_file", str(tmp_path / "results.json")])

    # Held out: a quarter of 32 and of 12 prompts. Trained on: own's other 9 whole, twice as many of the 24
    report = json.loads((tmp_path / "data_report.json").read_text())["splits"]
    assert report["train"]["sources"] == {f"{tiny_data}/train.jsonl": 18, f"{tmp_path}/own.jsonl": 9}
    assert report["held-out"]["sources"] == {f"{tiny_data}/train.jsonl": 8, f"{tmp_path}/own.jsonl": 3}
    assert json.loads((tmp_path / "results.json").read_text())["n_pairs"] == 11
    metrics = json.loads((tmp_path / "dpo" / "training_metrics.json").read_text())
    assert any("eval_loss" in record for record in metrics["log_history"])
