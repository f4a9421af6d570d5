"""containers/entry.sh without a container: what a shell is told, what is refused, and where SIGTERM goes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = 1234


@pytest.fixture
def project() -> Iterator[Path]:
    """A project's root that any user reaches, which pytest's own folders are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(ROOT / "containers", folder / "containers")
    (folder / "runs").mkdir()
    (folder / "runs").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def environment(variables: dict[str, str]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("MODEL_NAME", "DATASET", "RECIPE")}
    return own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables


def enter(
    project: Path, *command: str, typed: str = "", user: int | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [project / "containers" / "entry.sh", *command],
        env=environment(variables),
        input=typed,
        capture_output=True,
        text=True,
        user=user if os.getuid() == 0 else None,  # root may read and write everything
    )


def test_commands_are_read_from_standard_input(project: Path):
    done = enter(project, typed="pwd; echo $HF_TOKEN; exit 7", HF_TOKEN="hf_x")
    assert (done.returncode, done.stdout) == (7, f"{project}\nhf_x\n")
    assert (
        done.stderr == f"Tandem in {project}. Type: MODEL_NAME=google/gemma-3-270m ./pipelines/dpo_pipeline_sanity.sh\n"
    )
    named = enter(project, typed="true", MODEL_NAME="my/model")
    assert named.stderr == f"Tandem in {project}. Type: ./pipelines/dpo_pipeline_sanity.sh (MODEL_NAME=my/model)\n"


def test_a_command_gets_its_words_and_gives_its_exit_code(project: Path):
    done = enter(project, "bash", "-c", 'printf "%s\\n" "$@"; exit 5', "-", "two words", "*")
    assert (done.returncode, done.stdout, done.stderr) == (5, "two words\n*\n", "")
    missing = enter(project, "no-such-program")
    assert (missing.returncode, missing.stderr) == (127, "UserError: no-such-program: No such file or directory\n")


def test_runs_that_the_user_may_not_write_to(project: Path):
    (project / "runs").chmod(0o555)
    refused = enter(project, typed="touch runs/x", user=NOBODY)
    assert refused.returncode == 2
    assert refused.stderr.startswith("UserError: runs/ is not writable for user ")
    assert refused.stderr.count("\n") == 1


def test_a_file_of_the_host_that_the_user_may_not_read_is_named(project: Path):
    # What is mounted is below /mnt; here is nothing, so the script looks elsewhere
    script = project / "containers" / "entry.sh"
    text = script.read_text()
    assert text.count("/mnt/*") == 1
    script.write_text(text.replace("/mnt/*", f"{project}/*"))
    model = project / "model"
    model.mkdir()
    (model / "config.json").touch()
    (model / "model.safetensors").touch(0o600)
    if os.getuid() != 0:
        (model / "model.safetensors").chmod(0)
    refused = enter(project, typed="true", user=NOBODY, MODEL_NAME=str(model))
    assert refused.returncode == 2
    assert f"UserError: MODEL_NAME: {model}/model.safetensors is not readable for user" in refused.stderr
    (model / "model.safetensors").chmod(0o644)
    assert "not readable" not in enter(project, "true", user=NOBODY, MODEL_NAME=str(model)).stderr


def test_sigterm_reaches_what_the_shell_runs(project: Path):
    """The shell alone would wait for its program, and the program never hear of it."""
    script = f"{sys.executable} -c 'import signal, sys, time; signal.signal(15, lambda *_: (print(1), sys.exit(75)));"
    script += f' open("{project}/ready", "w"); time.sleep(60)\'; exit $?'
    container = subprocess.Popen(
        [project / "containers" / "entry.sh", "bash", "-c", script],
        env=environment({}),
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (project / "ready").exists():
        assert container.poll() is None
        time.sleep(0.01)
    container.send_signal(signal.SIGTERM)
    screen, _ = container.communicate(timeout=30)
    assert (container.returncode, screen) == (75, "1\n")
