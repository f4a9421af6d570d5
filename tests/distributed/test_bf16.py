"""What people run on GPUs, at small size: bfloat16, sharded over two processes, accumulated gradients.

The settings are those of the recipes; the models are wide enough for bfloat16 to round (`tests.wide`).
"""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests import tiny, wide
from tests.distributed.launches import ROOT, log_history, run, steps

STEPS = 3
PROCESSES = 2


def recipe(name: str, stage: str, processes: int, **changes: object) -> list[str]:
    """The command line of a recipe on another model and other data; one process accumulates what two share."""
    config = ROOT / "pipelines" / "recipes" / name / f"{stage}.yaml"
    own = {
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // processes,
        "bf16": "true",
    }
    flags = [part for name, value in (own | changes).items() for part in (f"--{name}", str(value))]
    return [f"{stage}.py", "--config", str(config), *flags]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide.save_model(tmp_path_factory.mktemp("wide") / "llama")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide.save_model(tmp_path_factory.mktemp("wide") / "gemma3", "gemma3")


FULL = {"use_peft": "false", "dtype": "float32"}
CASES = {
    "lora": ("llama3_70b", "llama", {}),
    "full": ("llama3_70b", "llama", FULL),
    "gemma3-lora": ("gemma3_27b", "gemma3", {}),
    "gemma3-full": ("gemma3_27b", "gemma3", FULL),
}


def train(
    script: Callable[[str], ModuleType], request: pytest.FixtureRequest, data: Path, folder: Path, *names: str
) -> None:
    """Each case on one process and on two; the same losses, in the layout that was asked for, from ln 2 on."""
    runs = []
    for name in names:
        config, model, changes = CASES[name]
        model = request.getfixturevalue(model)
        own = {"model_name_or_path": model, "dataset_name": data, **changes}
        for processes in (1, PROCESSES):
            kind = "one" if processes == 1 else "two"
            places = {"output_dir": folder / name / kind, "ref_cache": folder / name / f"cache-{kind}"}
            command = recipe(config, "dpo", processes, **own, **places)
            if processes == 1:
                script("dpo").main([*command[1:], "--use_cpu", "true"])
            else:
                runs.append(command)
    said = run("fsdp", PROCESSES, *runs)
    assert said.count("layout shared (differs from padded by") >= len(names)  # a later run logs to the earlier ones too
    assert "layout padded" not in said and "padded forward" not in said
    for name in names:
        ours, theirs = steps(folder / name / "two"), steps(folder / name / "one")
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01  # it learns
        assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=5e-3)


@pytest.mark.slow
def test_the_recipes_of_large_models_train_sharded_as_alone(script, request, tiny_data, tmp_path):
    train(script, request, tiny_data, tmp_path, "full", "gemma3-lora", "gemma3-full")


def test_lora_with_accumulation_trains_sharded_as_alone(script, request, tiny_data, tmp_path):
    train(script, request, tiny_data, tmp_path, "lora")


def same_until(cut: int, row: dict[str, str]) -> dict[str, str]:
    """The row with answers that differ beyond `cut` tokens alone: what is left of both is the same."""
    prompt = row["chosen"].rpartition("Assistant:")[0] + "Assistant:"
    answer = " well" * cut
    return {"chosen": f"{prompt}{answer} yes", "rejected": f"{prompt}{answer} no"}


@pytest.mark.slow
def test_uneven_steps_evaluation_and_one_checkpoint(script, llama, tmp_path):
    """Seven pairs in steps of four, of whose rejected answers two have no token of their own: a micro-batch is a pair,
    so the process that has it forwards none."""
    rows = tiny.hh_rows(10)
    rows[1], rows[4] = (same_until(64, rows[index]) for index in (1, 4))
    (tmp_path / "data").mkdir()
    tiny.save_pairs(tmp_path / "data" / "train.jsonl", rows[:7])
    tiny.save_pairs(tmp_path / "data" / "test.jsonl", rows[7:])
    own = {
        "model_name_or_path": llama,
        "dataset_name": tmp_path / "data",
        "max_prompt_length": 48,
        "max_length": 64,
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
    }
    runs = []
    for name, changes in {"lora": {}, "full": FULL}.items():
        for processes in (1, PROCESSES):
            folder = tmp_path / f"{name}-{processes}"
            places = {"output_dir": folder, "ref_cache": f"{folder}-cache"}
            command = recipe("llama3_70b", "dpo", processes, **own, **changes, **places)
            if processes == 1:
                script("dpo").main([*command[1:], "--use_cpu", "true"])
            else:
                runs.append(command)
    said = run("fsdp", PROCESSES, *runs)
    assert "layout padded" not in said and "padded forward" not in said
    for name in ("lora", "full"):
        one, two = (tmp_path / f"{name}-{processes}" for processes in (1, PROCESSES))
        ours, theirs = steps(two), steps(one)
        assert len(ours) == 4
        # Two processes fill a short step up with one of the epoch's first pairs, which counts in its mean
        for mine, other, nats in zip(ours, theirs, (5e-3, 5e-3, 5e-3, 5e-2), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], abs=nats)
        ours, theirs = ([entry for entry in log_history(each) if "eval_loss" in entry] for each in (two, one))
        assert len(ours) == 2
        assert [entry["eval_loss"] for entry in ours] == pytest.approx([e["eval_loss"] for e in theirs], abs=2e-2)
        assert [each.name for each in two.glob("checkpoint-*")] == ["checkpoint-4"]
