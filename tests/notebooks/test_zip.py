"""The Colab notebook's cells by themselves: the zip that `make package` writes, as an upload; what a T4 trains in."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch

from tests.notebooks.test_colab import NOTEBOOK, ROOT


def cell(beginning: str) -> str:
    """The source of the one code cell that begins so."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (found,) = [each.source for each in cells if each.cell_type == "code" and each.source.startswith(beginning)]
    return str(found)


UNPACK, PLAN = cell("import shutil"), cell("import torch")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("package") / "tandem.zip"
    subprocess.run([sys.executable, ROOT / "containers" / "package.py", file], check=True, capture_output=True)
    return file


class Colab:
    """A machine: its folder, what its user uploads, and a `python -m pip` that writes down what it is asked for."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, keep: Path) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir()
        keep.mkdir(exist_ok=True)
        patch.chdir(folder)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\necho "$@" >>{folder}/installed\n')
        python.chmod(0o755)
        patch.setattr(sys, "executable", str(python))
        self.uploads: list[Path] = []
        colab = ModuleType("google.colab")
        vars(colab)["files"] = SimpleNamespace(upload=self.upload)
        patch.setitem(sys.modules, "google", ModuleType("google"))
        patch.setitem(sys.modules, "google.colab", colab)

    def upload(self) -> dict[str, bytes]:
        """As Colab's: the files are put into the current folder, and handed back."""
        return {file.name: Path(shutil.copy(file, self.folder)).read_bytes() for file in self.uploads}

    def unpack(self, repository: str = "") -> Path:
        variables: dict[str, Any] = {"Path": Path, "REPOSITORY": repository, "KEEP": self.keep}
        exec(UNPACK, variables)
        tandem: Path = variables["TANDEM"]
        return tandem


def test_an_uploaded_package_is_unpacked_installed_and_kept(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python = sys.executable
    colab = Colab(tmp_path / "machine", monkeypatch, tmp_path / "keep")
    colab.uploads = [package]
    tandem = colab.unpack()
    assert tandem == tmp_path / "machine" / "tandem"
    installed = (colab.folder / "installed").read_text().splitlines()
    assert installed == [
        f"-m pip install -q -r {tandem}/requirements.txt",
        f"-m pip install -q --no-deps -e {tandem}",
    ]
    colab.unpack()  # the cell again: what is there is used

    # Nothing but what was unpacked: the pipeline starts, and a stage's script reads its recipe
    environment = os.environ | {
        "PYTHONPATH": str(tandem / "src"),
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
    }
    environment.pop("MODEL_NAME", None)
    run = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
    pipeline = subprocess.run([tandem / "pipelines" / "dpo_pipeline_sanity.sh"], **run)
    assert (pipeline.returncode, pipeline.stderr) == (
        2,
        "UserError: MODEL_NAME is required: a model folder or Hub name\n",
    )
    script = [python, tandem / "scripts" / "dpo.py", "--config", tandem / "pipelines/recipes/sanity/dpo.yaml"]
    needed = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    printed = subprocess.run([*script, *needed, "--print_config"], **run)
    assert "beta: 0.1" in printed.stdout, printed.stderr
    where = subprocess.run([python, "-c", "import tandem.data.sample as s; print(s.sample_path('train'))"], **run)
    assert Path(where.stdout.strip()).is_relative_to(tandem) and Path(where.stdout.strip()).is_file()

    second = Colab(tmp_path / "second", monkeypatch, tmp_path / "keep")  # which is asked for no upload
    assert second.unpack() == tmp_path / "second" / "tandem"


def test_a_path_to_the_package_does_as_well(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    colab = Colab(tmp_path / "machine", monkeypatch, tmp_path / "keep")
    assert (colab.unpack(str(package)) / "pyproject.toml").is_file()
    assert not (tmp_path / "keep" / "tandem.zip").exists()


def test_another_upload_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    colab = Colab(tmp_path / "machine", monkeypatch, tmp_path / "keep")
    other = tmp_path / "main.zip"
    with zipfile.ZipFile(other, "w") as files:
        files.writestr("tandem-main/pyproject.toml", "")
    text = tmp_path / "notes.txt"
    text.write_text("no zip")
    for uploads, message in (
        ([other], "main.zip is not the zip that `make package` writes"),
        ([text], "notes.txt is not a zip"),
        ([], "upload one file"),
    ):
        colab.uploads = uploads
        with pytest.raises(AssertionError, match=message):
            colab.unpack()
    assert not list((tmp_path / "keep").iterdir()) and not (colab.folder / "tandem").exists()


class Machine:
    """Runs the cell of the plan with a GPU that torch is told of, and a `subprocess.run` that plans nothing."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.planned: list[list[str]] = []
        (folder / "keep" / "colab").mkdir(parents=True)
        patch.setenv("OUTPUT_DIR", str(folder / "runs" / "colab"))
        patch.delenv("RECIPE", raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")

    def plan(self, command: list[Any], **_: Any) -> Any:
        if "tandem.launch.held_out" in command:
            return SimpleNamespace(returncode=0, stdout="0.25\n")
        self.planned.append([str(word) for word in command])
        return SimpleNamespace(returncode=0, stdout="time: 5 min of training")

    def __call__(self, *, bf16: bool, model: str = "SmolLM2", precision: str = "") -> tuple[str, str]:
        """PRECISION, and the lines of dpo.yaml that are of it."""
        self.patch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        variables: dict[str, Any] = {
            "Path": Path, "os": os, "sys": sys, "shutil": shutil, "subprocess": SimpleNamespace(
                run=self.plan, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT),
            "TANDEM": ROOT, "KEEP": self.folder / "keep", "KEPT_RUN": self.folder / "keep" / "colab",
            "RUN_NAME": "colab", "MODEL_NAME": model, "DATASET": "", "PRECISION": precision,
        }  # fmt: skip
        exec(PLAN, variables)
        recipe = (variables["RECIPE"] / "dpo.yaml").read_text().splitlines()
        return variables["PRECISION"], " ".join(line for line in recipe if line.startswith(("bf16", "fp16")))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_a_t4_trains_in_fp16_and_gemma_in_float32(machine: Machine, capsys: pytest.CaptureFixture[str]):
    assert machine(bf16=False) == ("fp16", "fp16: true")
    assert "Tesla T4 has no bfloat16: this run trains in fp16" in capsys.readouterr().out
    assert machine(bf16=False, model="google/gemma-3-270m") == ("float32", "bf16: false")
    assert machine(bf16=False, precision="float32") == ("float32", "bf16: false")
    assert machine(bf16=True) == ("", "")  # the library's own default there: bfloat16


def test_a_run_goes_on_in_the_precision_that_it_began_with(machine: Machine):
    machine(bf16=False)
    (machine.folder / "keep" / "colab" / "sft").mkdir()
    assert machine(bf16=True) == ("fp16", "fp16: true")
    (machine.folder / "keep" / "colab.precision").write_text("")
    assert machine(bf16=False) == ("", "")


def test_the_times_are_the_plans(machine: Machine, capsys: pytest.CaptureFixture[str]):
    machine(bf16=False)
    assert [Path(command[1]).name for command in machine.planned] == ["sft.py", "dpo.py"]
    assert all({"--plan", "SmolLM2", "--val_ratio", "0.25"} <= set(command) for command in machine.planned)
    assert capsys.readouterr().out.count("time: 5 min of training") == 2
