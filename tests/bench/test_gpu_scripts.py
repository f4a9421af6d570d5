"""What bench/gpu runs on another machine: its shell parses, and each command line that it gives is taken."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import run

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "bench" / "gpu" / "smoke.sh"
PREPARE = ROOT / "bench" / "gpu" / "prepare.sh"


@pytest.mark.parametrize("script", [SMOKE, PREPARE], ids=lambda path: path.name)
def test_the_shell_parses(script: Path):
    subprocess.run(["bash", "-n", script], check=True)


def test_the_tests_it_names_are_there():
    named = re.findall(r"tests/\S+\.py", SMOKE.read_text())
    assert named and all((ROOT / file).is_file() for file in named)


def test_it_packs_the_versions_that_tandem_was_tested_with():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    packed = dict(re.findall(r"\b([\w-]+)==([\w.]+)", PREPARE.read_text()))
    assert {"transformers", "trl", "peft", "accelerate"} <= packed.keys()
    assert {name: version for name, version in packed.items() if name in pinned} == {
        name: pinned[name] for name in packed if name in pinned
    }


@pytest.mark.parametrize(
    "given",
    [
        *(f"--device cuda --settings {name} --repeats 1" for name in re.findall(r"ratios (\w+) ", SMOKE.read_text())),
        "--device cuda --short",
        "--short",
    ],
)
def test_each_side_of_a_setting_is_a_command_line_of_the_worker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, given: str
):
    """The runs themselves are not made."""
    from bench import worker

    parsed = []

    def done(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", command[1:])
        parsed.append(worker.parse())
        figures = dict.fromkeys(
            ("flops_allow", "pairs_per_s", "cpu_s", "peak_gb", "of_matmul", "monitor_share"), "1.0"
        ) | {"losses": "[0.69]"}
        line = ", ".join(f'"{name}": {value}' for name, value in figures.items())
        return subprocess.CompletedProcess(command, 0, "{" + line + "}", "")

    monkeypatch.setattr(run.subprocess, "run", done)
    monkeypatch.setattr(sys, "argv", shlex.split(f"run.py {given} --model {tmp_path}"))
    run.main()
    assert {one.side for one in parsed} == {"trl_precompute", "shared"}
    assert all(one.random == ("tiny" if one.device == "cpu" else one.random) for one in parsed)
    assert all(one.device == ("cuda" if "cuda" in given else "cpu") for one in parsed)
    assert capsys.readouterr().out.count("| **1.00** |") == len(parsed) // 2
