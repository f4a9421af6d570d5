"""The images, built and run by docker, or by the stand-in for it that may lie beside the checkout. Takes minutes.

On a machine with docker torch comes from PyPI, with CUDA's libraries, unless TORCH_INDEX names another index. Under
the stand-in, which needs root, it is the torch that this machine's own pip finds.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.pipelines.test_pipeline import write_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT.parent / "shared" / "tools"
IMAGE, GAUDI_IMAGE, GAUDI_BASE = "tandem-test", "tandem-test-gaudi", "localhost/tandem-test-gaudi-base"
TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
INDEX_PORT = 8765  # part of a build argument, so that another one would build all layers again
USER = 1234


class Project:
    """A copy of what the images are built from, so that its runs/ is nobody's, and the engine to build it with."""

    def __init__(self, folder: Path, environment: dict[str, str], *, stand_in: bool) -> None:
        self.folder, self.environment, self.stand_in = folder, environment, stand_in
        names = ["accelerate_configs", "containers", "pipelines", "scripts", "src", ".dockerignore", "Makefile"]
        names += ["LICENSE", "README.md", "pyproject.toml", "requirements.txt", "requirements-gaudi.txt"]
        for name in [*names, "Dockerfile", "Dockerfile.gaudi"]:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)

    def start(self, *words: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, typed: str = "", **variables: str) -> tuple[int, str]:
        """The exit code of a command, and all that it showed."""
        process = self.start(*words, **variables)
        screen, _ = process.communicate(typed)
        return process.returncode, screen

    def owners(self, run: str) -> set[int]:
        folder = self.folder / "runs" / run
        return {path.lstat().st_uid for path in (folder, *folder.rglob("*"))}

    def stop(self, make: "subprocess.Popen[str]") -> None:
        """What `docker stop` does: SIGTERM to the container's own process. The stand-in has no namespaces."""
        if not self.stand_in:
            name = subprocess.check_output(["docker", "ps", "-q", "--filter", f"ancestor={IMAGE}"], text=True).strip()
            subprocess.run(["docker", "stop", name], check=True)
            return
        for process in psutil.Process(make.pid).children(recursive=True):  # parents come before their children
            if "tandem.launch.supervise" in process.cmdline():
                process.terminate()
                return
        pytest.fail("no process of the container was found")


@pytest.fixture(scope="module")
def torch_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index with the torch that this machine's pip finds, for a build that shares its network."""
    folder = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.11", "--dest", str(folder / "torch"), TORCH]
    subprocess.run(command, check=True)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", INDEX_PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{INDEX_PORT}/"
        server.shutdown()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Project:
    """With the CUDA and CPU image built by `make build`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {"IMAGE": IMAGE, "DEVICE": "cpu", "TANDEM_DOCKER_VOLUMES": str(tmp_path_factory.mktemp("volumes"))}
    environment.setdefault("STORAGE_DRIVER", "overlay")  # of the stand-in: layers that are not copies of all below
    if not shutil.which("docker") and (STAND_IN / "docker").exists():
        environment["PATH"] = f"{STAND_IN}:{environment['PATH']}"
    if not shutil.which("docker", path=environment["PATH"]):
        pytest.skip("there is no docker")
    version = subprocess.run(["docker", "version"], env=environment, capture_output=True, text=True)
    if version.returncode != 0:
        pytest.skip(f"docker is not usable: {version.stderr.strip()}")
    stand_in = "stand-in" in version.stdout
    if stand_in and "TORCH_INDEX" not in environment:
        environment["TORCH_INDEX"] = request.getfixturevalue("torch_index")
    project = Project(tmp_path_factory.mktemp("project"), environment, stand_in=stand_in)
    code, screen = project("make", "build")
    assert code == 0, screen[-3000:]
    assert screen.startswith("device: cpu (this host has: ")
    return project


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, 16 pairs and a short recipe on the host, for everybody to read."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_model(folder / "model")
    tiny.save_pairs(folder / "pairs.jsonl", tiny.hh_rows(16))
    write_recipe(folder / "recipe")
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))
    names = {"MODEL_NAME": "model", "DATASET": "pairs.jsonl", "RECIPE": "recipe"}
    return {variable: str(folder / name) for variable, name in names.items()}


def test_the_shell(project: Project):
    typed = (
        "pwd; id -u; id -g; echo token=$HF_TOKEN; command -v gcc; whoami 2>/dev/null || echo $USER\n"
        "python -c \"import os, sysconfig; print(os.path.exists(sysconfig.get_path('include') + '/Python.h'))\"\n"
        "touch runs/mine ~/.cache/mine /home/tandem/mine && echo written; ls; exit 7\n"
    )
    code, screen = project("make", "run", "HF_TOKEN=hf_secret", typed=typed, HOST_UID=str(USER), HOST_GID="5")
    assert code == 2 and "Error 7" in screen  # make's own way to tell of a 7
    for line in (
        "Tandem in /opt/tandem. Type: MODEL_NAME=google/gemma-3-270m ./pipelines/dpo_pipeline_sanity.sh",
        f"/opt/tandem\n{USER}\n5\ntoken=hf_secret\n/usr/bin/gcc\ntandem\nTrue\nwritten\n",
    ):
        assert line in screen
    seen = screen.split("written\n")[1].split()
    assert {"accelerate_configs", "pipelines", "scripts", "src", "runs"} <= set(seen)
    assert not {"tests", "docs", "bench", "notebooks", ".git"} & set(seen)
    assert "hf_secret" not in screen.split("/opt/tandem\n")[0]  # what make printed
    assert (project.folder / "runs" / "mine").stat().st_uid == USER


def test_the_folders_that_any_user_writes_to(project: Project):
    """In the image itself: docker gives a new volume the mode of the folder that it lies on."""
    folders = ["/home/tandem", "/home/tandem/.cache", "/opt/tandem/runs"]
    code, screen = project("docker", "run", "--rm", "--user", "4321:4321", IMAGE, "stat", "-c", "%n %a %u:%g", *folders)
    assert code == 0
    assert screen.splitlines()[-3:] == [f"{folder} 1777 0:0" for folder in folders]


def test_a_file_that_is_missing_is_refused_before_the_start(project: Project, inputs: dict[str, str]):
    code, screen = project("make", "pipeline", **inputs | {"DATASET": "nowhere.jsonl"})
    assert code == 2
    assert "UserError: DATASET nowhere.jsonl: no such file or folder on this host\n" in screen
    assert "Tandem in" not in screen and not (project.folder / "runs" / "dpo_sanity").exists()


def test_a_file_that_the_user_may_not_read_is_named(project: Project, inputs: dict[str, str]):
    secret = project.folder / "secret.jsonl"
    shutil.copy(inputs["DATASET"], secret)
    secret.chmod(0o600)
    changes = {"DATASET": str(secret), "HOST_UID": str(USER), "HOST_GID": str(USER)}
    code, screen = project("make", "pipeline", **inputs | changes)
    assert code == 2
    assert f"UserError: DATASET: /mnt/dataset/secret.jsonl is not readable for user {USER}" in screen


def test_roots_pipeline_typed_into_the_shell(project: Project, inputs: dict[str, str]):
    code, screen = project("make", "run", "HF_TOKEN=x", typed="./pipelines/dpo_pipeline_sanity.sh\n", **inputs)
    assert code == 0, screen[-3000:]
    assert (project.folder / "runs" / "dpo_sanity" / "report.html").stat().st_size > 10_000
    assert project.owners("dpo_sanity") == {os.getuid()}


def test_another_users_pipeline_is_stopped_and_goes_on(project: Project, inputs: dict[str, str]):
    run = project.folder / "runs" / "other"
    inputs = inputs | {"OUTPUT_DIR": "runs/other", "HOST_UID": str(USER), "HOST_GID": str(USER)}
    pipeline = project.start("make", "pipeline", **inputs)
    while not list((run / "dpo").glob("checkpoint-*")):
        assert pipeline.poll() is None, pipeline.communicate()[0]
        time.sleep(0.05)
    project.stop(pipeline)
    screen, _ = pipeline.communicate(timeout=120)
    assert pipeline.returncode == 2 and "Error 75" in screen, screen[-3000:]
    assert "== dpo was preempted (exit code 75)" in screen
    last = max(int(folder.name.split("-")[1]) for folder in (run / "dpo").glob("checkpoint-*"))
    assert last < 40 and not (run / "dpo" / "manifest.json").exists()

    code, screen = project("make", "pipeline", **inputs)
    assert code == 0, screen[-3000:]
    assert "== sft: done before" in screen
    assert f"resuming from /opt/tandem/runs/other/dpo/checkpoint-{last}" in screen
    assert (run / "report.html").exists()
    assert project.owners("other") == {USER}


@pytest.fixture(scope="module")
def gaudi(project: Project) -> Project:
    """With the Gaudi image built over one that has a torch, as Intel's bases have."""
    recipe = project.folder / "gaudi-base"
    index = "--index-url $TORCH_INDEX" if "TORCH_INDEX" in project.environment else ""
    recipe.write_text(
        "FROM python:3.11-slim-bookworm\nARG TORCH_INDEX\n"
        f"RUN pip install -q --no-cache-dir --no-deps {index} {TORCH}\nRUN pip install -q --no-cache-dir {TORCH}\n"
    )
    arguments = ["--build-arg", f"TORCH_INDEX={project.environment.get('TORCH_INDEX', '')}"]
    code, screen = project("docker", "build", "-t", GAUDI_BASE, "-f", recipe.name, *arguments, ".")
    assert code == 0, screen[-3000:]
    code, screen = project("make", "build", f"BASE={GAUDI_BASE}", DEVICE="gaudi", IMAGE=GAUDI_IMAGE)
    assert code == 0, screen[-3000:]
    return project


def test_the_gaudi_image_imports_its_environment_and_trains_with_the_stub(gaudi: Project):
    typed = """
set -e
python scripts/dpo.py --help | grep -e --flash_attention_recompute
pip list 2>/dev/null | grep -E '^(torch|optimum-habana) '
python -c 'import habana_frameworks.torch, optimum.habana.transformers, trl, peft; print("imported")'
python -c '
from pathlib import Path
from tests import tiny
tiny.save_model(Path("runs/model"))
tiny.save_pairs(Path("runs/pairs.jsonl"), tiny.hh_rows(16))'
python scripts/dpo.py --model_name_or_path runs/model --dataset_name runs/pairs.jsonl --output_dir runs/gaudi \
  --max_length 96 --bf16 false --per_device_train_batch_size 4 --max_steps 4 --use_peft
"""
    options = ["--rm", "-i", "--user", f"{USER}:{USER}", "-v", f"{ROOT / 'tests'}:/beside/tests:ro"]
    for variable in ("PYTHONPATH=/beside/tests/gaudi/stub:/beside", "TANDEM_TRAINERS=gaudi", "HF_HUB_OFFLINE=1"):
        options += ["-e", variable]
    command = ["containers/run.sh", "docker", "run", *options, "--", GAUDI_IMAGE, "/opt/tandem/containers/entry.sh"]
    code, screen = gaudi(*command, typed=typed, HOST_UID=str(USER), HOST_GID=str(USER))
    assert code == 0, screen[-3000:]
    assert f"torch                         {TORCH.removeprefix('torch==')}".split() == next(
        line.replace("+cpu", "").split() for line in screen.splitlines() if line.startswith("torch ")
    )
    assert "imported\n" in screen
    assert "tandem: Gaudi: layout padded, every row 96 tokens long" in screen  # the trainer was optimum-habana's
    assert (gaudi.folder / "runs" / "gaudi" / "adapter_model.safetensors").exists()
    assert gaudi.owners("gaudi") == {USER}
