"""The corpus of bad files and YAML through the real pipeline: its line is shown, and nothing looks finished."""

import os
import subprocess
from pathlib import Path

import pytest

from tandem.errors import one_line
from tandem.runs import is_complete
from tests import tiny
from tests.bad_configs import BAD_CONFIGS
from tests.bad_files import BAD_FILES

ROOT = Path(__file__).parents[2]
FEW = ("half a line", "a gzip cut off")


def run(folder: Path, model: Path, data: Path, recipe: Path | None = None, **changes: str) -> str:
    """What a pipeline that was given wrong input shows; it must have left nothing that looks finished."""
    out = folder / "run"
    environment = os.environ | {
        "MODEL_NAME": str(model),
        "DATASET": str(data),
        "OUTPUT_DIR": str(out),
        "RECIPE": str(recipe or ROOT / "pipelines" / "recipes" / "sanity"),
    }
    for name in ("JUDGE_MODEL", "JUDGE_BASE_URL", "MOUNT_DIR", "ACCELERATE_CONFIG"):
        environment.pop(name, None)
    environment |= changes
    command = [ROOT / "pipelines" / "dpo_pipeline_sanity.sh"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left <= {"dpo_pipeline_sanity.log"} | {
        f".stages/{name}" for name in (".last", "check.command", "check.begun", "hashes.json")
    }, left
    assert not any(is_complete(path) for path in [out, *out.glob("*")] if path.is_dir())
    return done.stdout


def check_file(folder: Path, model: Path, case: str) -> None:
    bad = BAD_FILES[case]
    file = folder / bad.name
    file.write_bytes(bad.data)
    shown = run(folder, model, file)
    expected = one_line("UserError: " + bad.message.format(file=file))
    assert expected.removesuffix("…") in shown
    assert "== check was given wrong input (exit code 2)" in shown


@pytest.mark.parametrize("case", FEW)
def test_a_few_bad_files(tmp_path: Path, tiny_model: Path, case: str):
    check_file(tmp_path, tiny_model, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in BAD_FILES if case not in FEW])
def test_all_bad_files(tmp_path: Path, tiny_model: Path, case: str):
    check_file(tmp_path, tiny_model, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, bad in BAD_CONFIGS.items() if bad.yaml is not None])
def test_all_bad_yaml(tmp_path: Path, tiny_model: Path, tiny_data: Path, case: str):
    """As the recipe's file for the first stage, which knows fewer options: the point is that nothing is left."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    yaml = BAD_CONFIGS[case].yaml
    assert yaml is not None
    (recipe / "check.yaml").write_bytes(yaml)
    shown = run(tmp_path, tiny_model, tiny_data, recipe)
    assert f"UserError: stage check: --config {recipe}/check.yaml: " in shown
    assert not (tmp_path / "run").exists()


def test_later_stages_are_checked_before_the_first(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    """What is wrong with each, in one line; the first stage has not begun."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "sft.yaml").write_text("use_peft: true\n")
    (recipe / "dpo.yaml").write_text("beta: 0\nlora_r: 8\nglobal_batch_size: 12\n")
    (recipe / "evaluate.yaml").write_text("prompt_key: question\n")
    (recipe / "compare.yaml").write_text("temprature: 0.5\n")
    shown = run(tmp_path, tiny_model, tiny_data, recipe)
    assert shown.splitlines() == [
        "UserError: stage dpo: --lora_r has no effect without --use_peft; --beta must be above 0, not 0.0; "
        "--global_batch_size 12 is not a multiple of 8: --per_device_train_batch_size 8 on 1 processes; "
        f"stage evaluate: {tiny_data}/train.jsonl row 1: no column 'question', named by a --…_key option "
        "(has chosen, rejected); "
        f"stage compare: --config {recipe}/compare.yaml: unknown option temprature; did you mean temperature?"
    ]
    assert not (tmp_path / "run").exists()


def test_an_accelerate_config_that_is_not_there(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    shown = run(tmp_path, tiny_model, tiny_data, ACCELERATE_CONFIG="gone.yaml")
    assert shown.startswith("UserError: ACCELERATE_CONFIG gone.yaml: cannot be read: ")


def test_val_ratio_is_passed_to_every_stage(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    shown = run(tmp_path, tiny_model, tiny_data, VAL_RATIO="2")
    stages = ("check", "sft", "dpo", "evaluate", "compare")
    refused = "--val_ratio must be at least 0 and below 1, not 2.0"
    assert shown == "UserError: " + "; ".join(f"stage {stage}: {refused}" for stage in stages) + "\n"


def test_a_data_set_whose_splits_cannot_be_told(tmp_path: Path, tiny_model: Path):
    (tmp_path / "data").mkdir()
    tiny.save_pairs(tmp_path / "data" / "test.jsonl", tiny.hh_rows(2))
    shown = run(tmp_path, tiny_model, tmp_path / "data")
    assert shown.startswith(f"UserError: --dataset_name {tmp_path}/data: test.jsonl is held out, and there is nothing")
    assert shown.count("\n") == 1
