"""The `tandem` command of an installed package: the scripts under other names, and what concerns the installation."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tandem
from tandem.commands import cli, completion, doctor
from tandem.errors import UserError

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tandem", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_it_is_the_entry_of_a_distribution_with_a_name_of_its_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "tandem-dpo"
    assert project["scripts"] == {"tandem": "tandem.commands.cli:run"}


def test_nobody_is_told_to_install_a_strangers_package():
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("notebooks/*")]
    assert not [file for file in files if "tandem[" in file.read_text()]


def test_every_script_is_a_command(capsys: pytest.CaptureFixture[str]):
    assert cli.commands() == SCRIPTS
    cli.main([])
    lines = capsys.readouterr().out.splitlines()
    assert "    dpo           Train a policy on preference pairs with DPO, from a model or an SFT adapter." in lines


@pytest.mark.parametrize("name", ["merge-lora", "merge_lora"])
def test_a_command_takes_the_options_of_its_script(name: str):
    with pytest.raises(UserError, match="--adapter is required"):
        cli.main([name])


@pytest.mark.parametrize(
    "words, said",
    [
        (["dbo"], "there is no command dbo; did you mean dpo?"),
        (["--verison"], "there is no command --verison; tandem --help lists them"),
        (["cli"], "there is no command cli"),
        (["doctor", "--all"], "tandem doctor: unexpected argument --all"),
        (["completion"], "tandem completion takes bash or zsh, not nothing"),
        (["completion", "fish"], "tandem completion takes bash or zsh, not fish"),
    ],
)
def test_refusals(words: list[str], said: str):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        cli.main(words)


def test_a_wrong_command_line_ends_with_code_2():
    done = run("dpo", "--learning-rate", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "UserError: command line: unknown option learning-rate; did you mean learning_rate?\n"


def test_help_names_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for called, shown in (("/usr/bin/tandem", "usage: tandem merge_lora "), ("merge_lora.py", "usage: merge_lora.py ")):
        monkeypatch.setattr(sys, "argv", [called])
        with pytest.raises(SystemExit):
            cli.main(["merge_lora", "--help"])
        assert capsys.readouterr().out.startswith(shown)


def test_the_version_names_the_packages(capsys: pytest.CaptureFixture[str]):
    cli.main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tandem {tandem.__version__}"
    assert any(line.startswith("trl 1.16") for line in lines)


def test_the_doctors_screenful_has_nothing_of_the_users():
    said = run("doctor", HF_TOKEN="hf_notshown", HOME="/home/notshown", WANDB_MODE="online").stdout
    assert said.startswith(f"tandem {tandem.__version__}, python ")
    assert "borrowed names are all there" in said
    assert "CPU only" in said or "driver" in said or "MPS" in said
    assert len(said.splitlines()) < 25
    assert "notshown" not in said and str(ROOT) not in said


def test_the_doctor_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.contract, "problems", lambda: ["trl 2.0: no such name"])
    assert "contract  trl 2.0: no such name" in doctor.diagnosis()


@pytest.mark.parametrize(
    "line, offered",
    [
        (["tandem", "ju"], ["judge"]),
        (["tandem", "merge-lora", "--adap"], ["--adapter"]),
        (["tandem", "dpo", "--loss_"], ["--loss_type", "--loss_weights"]),
    ],
)
def test_bash_completes(line: list[str], offered: list[str], tmp_path: Path):
    words = " ".join(f"'{word}'" for word in line)
    (tmp_path / "completion").write_text(completion.completion("bash", cli.commands()))
    script = f"source {tmp_path}/completion; COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; _tandem; "
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered
