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
    assert text.index("\nUSER 100") < text.index("\nCMD")
    assert "TOKEN" not in text.split("\n", 1)[1] and "KEY" not in text


def test_no_step_of_the_gaudi_image_may_bring_a_torch():
    for step in pip_steps((ROOT / "Dockerfile.gaudi").read_text()):
        assert not any(word.startswith("torch") for word in step)
    names = [line.split("==")[0] for line in (ROOT / "requirements-gaudi.txt").read_text().splitlines()]
    assert "torch" not in names


def test_make_build_takes_the_devices_dockerfile():
    assert "docker build -t tandem -f Dockerfile " in dry_make("build")
    gaudi = dry_make("build", "DEVICE=gaudi", "BASE=registry/image:tag")
    assert "docker build -t tandem-gaudi -f Dockerfile.gaudi --build-arg BASE=registry/image:tag" in gaudi


@pytest.mark.parametrize("device", ["cuda", "gaudi"])
def test_make_run_passes_the_token_by_name_and_not_by_value(device):
    printed = dry_make("run", f"DEVICE={device}", "HF_TOKEN=hf_secret", "MODEL_NAME=some/model")
    assert "-e HF_TOKEN" in printed and "-e MODEL_NAME" in printed
    assert "hf_secret" not in printed and "some/model" not in printed
    assert ("--runtime=habana" in printed) == (device == "gaudi")


def test_make_run_trains_on_the_device_that_it_is_given():
    """The pipelines' default is the CPU."""
    config = ["--eval", "config: ; @echo $(ACCELERATE_CONFIG)", "config"]
    assert dry_make(*config, "DEVICE=gaudi").split() == ["echo", "accelerate_configs/gaudi_lazy.yaml"]
    assert dry_make(*config, "GPUS=all").split() == ["echo", "accelerate_configs/single_gpu.yaml"]
    assert dry_make(*config).split() == ["echo"]
    assert dry_make(*config, "GPUS=all", "ACCELERATE_CONFIG=own.yaml").split() == ["echo", "own.yaml"]
    assert "-e ACCELERATE_CONFIG" in dry_make("run", "GPUS=all", "MODEL_NAME=some/model")


def test_replay_reads_joined_and_prefixed_commands():
    joined = "RUN pip freeze > c.txt \\\n    && X=1 pip install --no-cache-dir -r r.txt\n"
    text = joined + "RUN pip install --no-deps -e . && true\n"
    assert pip_steps(text) == [["-r", "r.txt"]]
