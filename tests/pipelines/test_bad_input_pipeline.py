"""The corpus of bad files and YAML through the real pipeline: its line is shown, and nothing looks finished."""

import os
import subprocess
from pathlib import Path

import pytest

from tandem.errors import one_line
from tandem.runs import is_complete
from tests.bad_configs import BAD_CONFIGS
from tests.bad_files import BAD_FILES

ROOT = Path(__file__).parents[2]
FEW = ("half a line", "a gzip cut off")


def run(folder: Path, model: Path, data: Path, recipe: Path | None = None) -> str:
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
    command = [ROOT / "pipelines" / "dpo_pipeline_sanity.sh"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left <= {"dpo_pipeline_sanity.log", ".stages/check.command"}, left
    assert not any(is_complete(path) for path in [out, *out.iterdir()] if path.is_dir())
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
    """As the recipe's file for the first stage, which knows fewer options: the point is what is left."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    yaml = BAD_CONFIGS[case].yaml
    assert yaml is not None
    (recipe / "check.yaml").write_bytes(yaml)
    shown = run(tmp_path, tiny_model, tiny_data, recipe)
    assert f"UserError: --config {recipe}/check.yaml: " in shown
