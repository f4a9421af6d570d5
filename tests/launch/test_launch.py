from pathlib import Path

import pytest

from tandem.launch.__main__ import main

CPU = str(Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml")


def script(tmp_path: Path, code: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(code)
    return str(path)


@pytest.mark.parametrize("code", [0, 2, 3, 75, 1])
def test_the_exit_code_is_the_scripts(tmp_path: Path, code: int):
    assert main(["--config_file", CPU, script(tmp_path, f"import sys; sys.exit({code})")]) == code


def test_arguments_reach_the_script(tmp_path: Path):
    target = tmp_path / "argv"
    name = script(tmp_path, "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))")
    assert main(["--config_file", CPU, name, str(target), "--use_peft", "true", "--loss_type", "ipo"]) == 0
    assert target.read_text() == "--use_peft true --loss_type ipo"


@pytest.mark.parametrize("code", [0, 75])
def test_several_processes(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch):
    """torchrun below accelerate turns every failure into an exception; the code of the first to fail is ours."""
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # accelerate sets it for the rest of this process
    name = script(tmp_path, f"import os, sys; sys.exit({code} if os.environ['RANK'] == '1' else 0)")
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    assert main([*launch, "--dynamo_backend", "no", "--main_process_port", "0", name]) == code


def test_a_launch_that_cannot_start_is_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--config_file", str(tmp_path / "gone.yaml"), "script.py"]) == 2
    typo = tmp_path / "typo.yaml"
    typo.write_text(Path(CPU).read_text() + "num_procesess: 2\n")
    assert main(["--config_file", str(typo), "script.py"]) == 2
    missing, unknown = capsys.readouterr().err.splitlines()
    assert missing.startswith("UserError: the launch cannot start: ")
    assert "gone.yaml" in missing
    assert "num_procesess" in unknown
