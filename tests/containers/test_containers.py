"""What the images are made of, as far as it can be shown where no engine builds them."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.containers.replay_pip import pip_steps

ROOT = Path(__file__).parents[2]


def dry_make(*arguments: str, **environment: str) -> str:
    command = ["make", "--no-print-directory", "-n", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gaudi"])
def test_images_install_what_the_pinned_files_say_and_run_as_a_user(name):
    text = (ROOT / name).read_text()
    requirements = "requirements-gaudi.txt" if "gaudi" in name else "requirements.txt"
    assert ["-r", requirements] in pip_steps(text)
    assert text.index("COPY " + requirements) < text.index("COPY . .")  # else each edit installs everything again
    assert text.index("\nUSER 1000:1000") < text.index("\nCMD")
    assert "TOKEN" not in text.split("\n", 1)[1] and "KEY" not in text


def test_no_step_of_the_gaudi_image_may_bring_a_torch():
    for step in pip_steps((ROOT / "Dockerfile.gaudi").read_text()):
        assert not any(word.startswith("torch") for word in step)
    names = [line.split("==")[0] for line in (ROOT / "requirements-gaudi.txt").read_text().splitlines()]
    assert "torch" not in names


def test_make_clean_leaves_trained_models():
    words = dry_make("clean").split()
    assert "rm" in words and "runs" not in words and "runs/" not in words


def test_make_build_takes_the_devices_dockerfile():
    assert "docker build -t tandem -f Dockerfile " in dry_make("build", "DEVICE=cpu")
    gaudi = dry_make("build", "DEVICE=gaudi", "BASE=registry/image:tag")
    assert "docker build -t tandem-gaudi -f Dockerfile.gaudi --build-arg BASE=registry/image:tag" in gaudi


@pytest.mark.parametrize("device", ["cuda", "gaudi"])
def test_make_run_passes_the_token_by_name_and_not_by_value(device):
    printed = dry_make("run", f"DEVICE={device}", "HF_TOKEN=hf_secret", "MODEL_NAME=some/model")
    assert "-e HF_TOKEN" in printed and "-e MODEL_NAME" in printed
    assert "hf_secret" not in printed and "some/model" not in printed
    assert ("--runtime=habana" in printed) == (device == "gaudi")


@pytest.mark.parametrize(
    ("arguments", "config", "processes"),
    [
        ("DEVICE=gaudi", "accelerate_configs/gaudi_lazy.yaml", ""),
        ("DEVICE=gaudi CARDS=0,1", "accelerate_configs/gaudi_multi_card.yaml", "2"),
        ("GPUS=1", "accelerate_configs/single_gpu.yaml", ""),
        ("GPUS=device=2", "accelerate_configs/single_gpu.yaml", ""),
        ("GPUS=device=0,3", "accelerate_configs/ddp.yaml", "2"),
        ("GPUS=4 ACCELERATE_CONFIG=accelerate_configs/fsdp.yaml", "accelerate_configs/fsdp.yaml", "4"),
        ("GPUS=4 ACCELERATE_CONFIG=accelerate_configs/single_gpu.yaml", "accelerate_configs/single_gpu.yaml", ""),
        ("DEVICE=cpu", "", ""),
    ],
)
def test_the_config_fits_the_devices(arguments: str, config: str, processes: str):
    """The pipelines' default is the CPU, and the configs for several devices name 8."""
    rule = ["--eval", "config: ; @echo [$(ACCELERATE_CONFIG)] [$(NUM_PROCESSES)]", "config"]
    assert dry_make(*rule, *arguments.split()) == f"echo [{config}] [{processes}]\n"


def test_a_device_that_is_none_is_refused():
    refused = subprocess.run(["make", "-n", "run", "DEVICE=tpu"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "UserError: DEVICE must be gaudi, cuda or cpu, not tpu" in refused.stderr


def test_the_container_runs_as_the_host_user_and_reads_standard_input():
    own = f"--user {os.getuid()}:{os.getgid()}"
    for target in ("run", "pipeline"):
        assert f"docker run --rm -i --init --stop-timeout=120 {own}" in dry_make(target)
    assert "--user 1234:5" in dry_make("run", HOST_UID="1234", HOST_GID="5")
    assert "--ipc=host" in dry_make("run", "DEVICE=cuda")


class Run:
    """containers/run.sh with a docker that prints what it was asked for, one argument a line, and the variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        docker = folder / "bin" / "docker"
        docker.parent.mkdir()
        docker.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"; env | grep -E '^(MODEL_NAME|DATASET|RECIPE|MOUNT_DIR)='\n")
        docker.chmod(0o755)

    def __call__(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"HOST_UID": str(os.getuid()), "HOST_GID": "0"} | variables
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        command = [ROOT / "containers" / "run.sh", "docker", "run", "--rm", "--", "tandem", "entry"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_what_lies_on_the_host_is_mounted(run: Run, tmp_path: Path):
    (tmp_path / "my pairs.jsonl").touch()
    (tmp_path / "mixture.yaml").touch()
    shown = run(DATASET=str(tmp_path / "my pairs.jsonl"), MODEL_NAME="google/gemma-3-270m", MOUNT_DIR=str(tmp_path))
    lines = shown.stdout.splitlines()
    assert f"{tmp_path}/my pairs.jsonl:/mnt/dataset/my pairs.jsonl:ro" in lines
    assert f"{tmp_path}:/mnt/mount-dir" in lines
    assert {"DATASET=/mnt/dataset/my pairs.jsonl", "MODEL_NAME=google/gemma-3-270m", "MOUNT_DIR=/mnt/mount-dir"} <= set(
        lines
    )
    lines = run(DATASET=str(tmp_path / "mixture.yaml")).stdout.splitlines()  # it names files beside it
    assert f"{tmp_path}:/mnt/dataset/{tmp_path.name}:ro" in lines
    assert f"DATASET=/mnt/dataset/{tmp_path.name}/mixture.yaml" in lines


def test_a_snapshot_of_the_hub_cache_is_mounted_with_its_blobs(run: Run, tmp_path: Path):
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").touch()
    (snapshot / "config.json").symlink_to("../../blobs/1")
    lines = run(MODEL_NAME=str(snapshot)).stdout.splitlines()
    assert f"{repository}:/mnt/model-name/{repository.name}:ro" in lines
    assert f"MODEL_NAME=/mnt/model-name/{repository.name}/snapshots/abc" in lines


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATASET", "gone.jsonl"),
        ("MODEL_NAME", "./gone"),
        ("MODEL_NAME", "/gone/model"),
        ("RECIPE", "gone"),
        ("ACCELERATE_CONFIG", "gone.yaml"),
        ("MOUNT_DIR", "gone"),
    ],
)
def test_what_is_not_on_the_host_is_refused_before_the_container_starts(run: Run, variable: str, value: str):
    refused = run(**{variable: value})
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith(f"UserError: {variable} {value}: no such ")


def test_a_link_out_of_a_mounted_folder_is_refused(run: Run, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "weights").touch()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "weights")
    refused = run(MODEL_NAME=str(tmp_path / "model"))
    assert refused.returncode == 2 and "links to a file outside the folder" in refused.stderr


def test_replay_reads_joined_and_prefixed_commands():
    joined = "RUN pip freeze > c.txt \\\n    && X=1 pip install --no-cache-dir -r r.txt\n"
    text = joined + "RUN pip install --no-deps -e . && true\n"
    assert pip_steps(text) == [["-r", "r.txt"]]
