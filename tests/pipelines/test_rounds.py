"""rounds.sh as a user runs it: what it refuses at once, and that kills leave no trace."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "pipelines" / "rounds.sh"
TRAINING = "max_length: 512\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-3\nuse_peft: true\nlora_r: 4\n"
RECIPE = {
    "sample": "num_samples: 3\ntemperature: 1.0\nmax_new_tokens: 300\nbatch_size: 64\n",
    "held_out": "temperature: 1.0\nmax_new_tokens: 300\nbatch_size: 64\n",
    "score": "{}\n",
    "make_pairs": "fail_on: none\nkeep_near_duplicates: true\n",
    "dpo": TRAINING + "save_steps: 1\nlogging_steps: 1\nbf16: false\ngradient_checkpointing: false\n",
}


def environment(folder: Path, **changes: str) -> dict[str, str]:
    given = {"MODEL_NAME": str(folder / "model"), "PROMPTS": str(folder / "prompts.jsonl"), "VAL_RATIO": "0.3"}
    given |= {"SCORER": f"function:{folder}/check.py:score", "RECIPE": str(folder / "recipe")}
    kept = {name: value for name, value in os.environ.items() if name not in ("ROUNDS", "REFERENCE")}
    return kept | given | {"OUTPUT_DIR": str(folder / "run"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | changes


def prepare(folder: Path) -> Path:
    """Model, prompts, scorer and recipe of `environment`."""
    tiny.save_model(folder / "model", tied=False)
    rows = [json.dumps({"prompt": f"say {word} {index}"}) + "\n" for index in range(2) for word in tiny.WORDS]
    (folder / "prompts.jsonl").write_text("".join(rows))
    (folder / "check.py").write_text("def score(prompt, answer, row):\n    return len(answer) % 7\n")
    (folder / "recipe").mkdir()
    for name, text in RECIPE.items():
        (folder / "recipe" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"SCORER": ""}, "SCORER is required"),
        ({"SCORER": "rewards:x"}, "a scorer is reward:MODEL"),
        ({"ROUNDS": "0"}, "ROUNDS must be"),
        ({"REFERENCE": "best"}, "previous or initial"),
        ({"OFFLINE_SHARE": "0.5"}, "no effect without OFFLINE_PAIRS"),
        ({"SCORER": "judge:a", "SECOND_SCORER": "judge:b"}, "another kind"),
        ({"SCORER": "reward:a", "SECOND_SCORER": "reward:a"}, "shows nothing"),
        ({"SCORER": "function:a.py:b"}, "--score_function a.py:b: no such file"),
        ({"RECIPE": "/nowhere"}, "RECIPE /nowhere: no such folder"),
        ({"OFFLINE_PAIRS": "none.jsonl"}, "stage check: --dataset_name none.jsonl: no such file or folder"),
        ({"JUDGE_BASE_URL": "http://127.0.0.1:1/v1"}, "JUDGE_BASE_URL has no effect"),
        ({"PROMPTS": "https://u:p@x/y"}, "password"),
    ],
)
def test_what_is_refused_at_once(folder: Path, changes: dict[str, str], said: str):
    done = subprocess.run([PIPELINE], env=environment(folder, **changes), capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("sampel.yaml", "num_samples: 2", "no stage reads sampel.yaml"),
        ("dpo.yaml", "use_peft: true\nload_in_4bit: true", "set ROUNDS=1"),
        ("rounds.yaml", "kl_promts: 3", "did you mean kl_prompts?"),
    ],
)
def test_a_recipe_that_cannot_be(folder: Path, file: str, text: str, said: str):
    """Before anything is drawn, the later rounds' too."""
    (folder / "recipe" / file).write_text(text)
    done = subprocess.run([PIPELINE], env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"OFFLINE_PAIRS": "pairs.jsonl", "REFERENCE": "initial", "SCORER": "reward:r"}]
)
def test_every_stage_of_two_rounds_passes_preflight(folder: Path, changes: dict[str, str]):
    """The options of all stages are read before the first begins; the data of none, as there are no pairs yet."""
    text = PIPELINE.read_text().replace('"$(dirname "${BASH_SOURCE[0]}")/lib.sh"', f'"{ROOT}/pipelines/lib.sh"')
    assert text.count("\nlog_to ") == 1
    text = text.replace("\nlog_to ", "\nexit 0\nlog_to ")
    tiny.save_pairs(folder / "pairs.jsonl", tiny.hh_rows(6))
    given = environment(folder, **changes)
    done = subprocess.run(["bash", "-c", text], env=given, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
