"""A side of the bench on random weights: there is no folder from which TRL could load a reference."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("side", ["trl", "shared"])
def test_random_weights(side: str, tiny_model: Path, tiny_data: Path):
    data = next(path for path in [*sorted(tiny_data.glob("train*")), tiny_data])
    command = [sys.executable, str(ROOT / "bench" / "worker.py"), "--side", side, "--model", str(tiny_model)]
    command += ["--data", str(data), "--random", "tiny", "--pairs", "4", "--batch", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
