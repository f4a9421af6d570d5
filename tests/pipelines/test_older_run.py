"""A whole run of an older version, commit 40aa243, kept as it left it: passed over, and gone on with.

`tests/kept/run_of_40aa243.tar.xz` holds a model of one layer, 16 pairs, a recipe, and what the sanity pipeline made of
them without a judge; report, log and reference cache are left out, and the checkout that it ran in is named /checkout.
"""

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tandem.runs import checkpoints, contents, is_complete, sha256_file

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "tests" / "kept" / "run_of_40aa243.tar.xz"


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def pipeline(**changes: str) -> tuple[int, list[str]]:
    environment = {"MODEL_NAME": "model", "DATASET": "data", "OUTPUT_DIR": "run", "RECIPE": "recipe"} | changes
    done = subprocess.run(
        [str(ROOT / "pipelines" / "dpo_pipeline_sanity.sh")],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.splitlines()


def test_its_pipeline_is_passed_over(older: Path):
    weights = {file: sha256_file(file) for file in older.rglob("*.safetensors")}
    code, screen = pipeline()
    assert code == 0, screen
    done = [line.split(":")[0].removeprefix("== ") for line in screen if ": done before (" in line]
    assert done == ["check", "sft", "merge_sft", "dpo", "merge_dpo", "evaluate", "compare"]
    assert (older / "report.html").exists()  # left out of the archive, so made of what the older version left
    assert {file: sha256_file(file) for file in older.rglob("*.safetensors")} == weights
    code, screen = pipeline()
    assert code == 0 and sum(": done before (" in line for line in screen) == 8


def test_its_settings_are_still_told_from_others(older: Path):
    recipe = older.parent / "recipe" / "dpo.yaml"
    recipe.write_text(recipe.read_text() + "beta: 0.3\n")
    code, screen = pipeline()
    assert code == 2
    assert screen[-1] == (
        "UserError: stage dpo was done with other settings in run (beta was 0.1, is 0.3): "
        "set another OUTPUT_DIR, or remove run/dpo"
    )


def test_its_checkpoint_is_gone_on_with(
    older: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
):
    command = ["--config", "run/dpo/config.yaml"]
    out = older / "dpo"
    before = sha256_file(out / "adapter_model.safetensors")
    script("dpo").main(command)
    assert "already trained with these settings" in capsys.readouterr().err
    (out / "manifest.json").unlink()
    (out / "adapter_model.safetensors").unlink()
    script("dpo").main(command)
    assert "resuming from run/dpo/checkpoint-6" in (out / "train.log").read_text()
    assert is_complete(out) and "adapter_model.safetensors" in contents(out)
    assert sha256_file(out / "adapter_model.safetensors") == before
    logs = json.loads((out / "training_metrics.json").read_text())["log_history"]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in checkpoints(out)] == ["checkpoint-6"]
