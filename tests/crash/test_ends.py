"""Saves and merges ended at each call that changes a file: whole or absent, and the same command ends right.

The shim (shim.c) is preloaded, so that it sees the calls of Python, torch, safetensors and SQLite alike.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc")
TRAININGS = ("dpo", "dpo_anew", "sft")
pytestmark = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux", reason="the shim needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def ended_everywhere(shim: Path, folder: Path, scenario: str, *options: str) -> str:
    """What `tests.crash.forks` says of a scenario, without a fault."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.forks", scenario, folder / "trial", *options],
        env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_a_merge_over_another_is_whole_or_absent(shim: Path, tmp_path: Path):
    """A few of its calls; `pytest -m slow` ends it at each."""
    said = ended_everywhere(shim, tmp_path, "merge_over", "--every", "11", "--from", "15", "--how", "zeros")
    assert " 0 with faults" in said


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(SCENARIOS.keys() - TRAININGS))
def test_every_call(shim: Path, tmp_path: Path, scenario: str):
    ended_everywhere(shim, tmp_path, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", TRAININGS)
def test_some_calls_of_a_training(shim: Path, tmp_path: Path, scenario: str):
    """A training after each of its hundreds of calls takes an hour: `python -m tests.crash.forks` does it in parts."""
    ended_everywhere(shim, tmp_path, scenario, "--every", "29")
