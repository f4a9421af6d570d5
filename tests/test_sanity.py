"""The sanity checks; `python tests/test_sanity.py [MODEL]` runs them as they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is run as a program

from tests import sanity

CHECKS = ["data", "tokenisation", "forward", "loss", "one training step", "checkpoint"]


def test_the_tiny_model_passes(capsys: pytest.CaptureFixture[str]):
    assert sanity.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[name, "ok"] for name in CHECKS]


def test_a_broken_model_fails_and_every_check_still_says_so(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert sanity.main([str(broken)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["ok", "ok", "failed", "failed", "failed", "failed"]
    assert "not finite" in lines[2]


def test_this_file_is_a_program_too():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[0] for line in done.stdout.splitlines() if ": ok" in line] == CHECKS


if __name__ == "__main__":
    sys.exit(sanity.main(sys.argv[1:]))
