"""The command lines that the README and issue 2 promise, as they are written there."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tandem.runs import is_complete
from tests import tiny
from tests.stub_hub import StubHub, hh_rlhf

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OFFLINE = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE"}


def test_accelerate_launch_with_names_of_the_hub(tmp_path: Path, tiny_model: Path):
    """Data, model and tokenizer come from a Hub that HF_ENDPOINT names."""
    hub = StubHub(
        {
            "datasets/Anthropic/hh-rlhf": hh_rlhf(tiny.hh_rows(20), tiny.hh_rows(6, start=20)),
            "owner/tiny": {path.name: path.read_bytes() for path in tiny_model.iterdir()},
        }
    )
    line = (
        "accelerate launch --config_file accelerate_configs/cpu.yaml scripts/dpo.py --model_name_or_path owner/tiny "
        "--tokenizer_name_or_path owner/tiny --dataset_name Anthropic/hh-rlhf --per_device_train_batch_size 1 "
        "--gradient_accumulation_steps 4 --learning_rate 5e-4 --max_length 512 --beta 0.1 --loss_type sigmoid "
        f"--num_train_epochs 1 --output_dir {tmp_path}/out --use_peft True"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with hub.serving() as url:
        done = subprocess.run(
            shlex.split(line), cwd=ROOT, env=environment | {"HF_ENDPOINT": url}, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert is_complete(tmp_path / "out")
    history = json.loads((tmp_path / "out" / "training_metrics.json").read_text())["log_history"]
    assert history[-1]["step"] == 5  # 20 pairs, 4 a step
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert any("helpful-base/train.jsonl.gz" in path for path in hub.requests)


@pytest.fixture
def line(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`line("python scripts/x.py …")`, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> None:
        python, path, *argv = shlex.split(text)
        assert python == "python"
        script(Path(path).stem).main(argv)

    return run


def test_compare(line: Callable[[str], None], tmp_path: Path, tiny_model: Path, tiny_data: Path):
    line(
        f"python scripts/compare.py --base_model {tiny_model} --finetuned_model {tiny_model} "
        f"--dataset_name {tiny_data} --seed 123 --greedy"
    )
    results = json.loads((tmp_path / "dpo_comparison_results.json").read_text())
    assert results["seed"] == 123
    assert len(results["comparisons"]) == 8


def test_evaluate(
    line: Callable[[str], None], tmp_path: Path, tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    line(
        f"python scripts/evaluate.py --reference_model {tiny_model} --sft_model {tiny_model} --dpo_model {tiny_model} "
        f"--dataset_name {tiny_data} --output_file results.json"
    )
    assert list(json.loads((tmp_path / "results.json").read_text())["models"]) == ["base", "sft", "dpo"]
    assert "| 8 held-out pairs | base | sft | dpo |" in capsys.readouterr().out


def test_each_script_replays_what_it_saved(
    line: Callable[[str], None], tmp_path: Path, tiny_model: Path, tiny_data: Path
):
    """The YAML beside an output, given as --config, makes the output again."""
    line(
        f"python scripts/generate.py --models base={tiny_model} dpo={tiny_model} --output_dir {tmp_path} "
        f"--dataset_name {tiny_data} --max_new_tokens 4 --seed 7"
    )
    answers = (tmp_path / "generations_dpo.jsonl").read_bytes()
    (tmp_path / "generations_dpo.jsonl").unlink()
    line("python scripts/generate.py --config generate.yaml")
    assert (tmp_path / "generations_dpo.jsonl").read_bytes() == answers

    line(f"python scripts/check_data.py --dataset_name {tiny_data} --report data_report.json")
    report = (tmp_path / "data_report.json").read_bytes()
    (tmp_path / "data_report.json").unlink()
    line("python scripts/check_data.py --config data_report.yaml")
    assert (tmp_path / "data_report.json").read_bytes() == report

    line(f"python scripts/merge_lora.py --adapter {tiny_model} --output_dir merged")
    line("python scripts/merge_lora.py --config merged.yaml")
    assert is_complete(tmp_path / "merged")
