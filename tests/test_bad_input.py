"""Bad input of every kind, through the scripts: one exact line, exit code 2, and nothing written or overwritten."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tandem.errors import AlarmStop, Preempted, TandemExit, UserError, script_main
from tandem.runs import MANIFEST, sha256_file, write_manifest
from tests import tiny
from tests.bad_configs import BAD_CONFIGS
from tests.bad_files import BAD_FILES, FORMATS, GOOD, SUFFIXES, lines

ROOT = Path(__file__).parents[1]


@pytest.fixture
def say(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`say("dpo", argv)`: the one line a script ends with; it must end with exit code 2."""

    def run(name: str, *argv: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script_main(script(name).main)
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("UserError: ")]
        assert len(errors) == 1
        return errors[0].removeprefix("UserError: ")

    return run


def check(said: str, expected: str) -> None:
    if expected.endswith("…"):
        assert said.startswith(expected[:-1])
    else:
        assert said == expected


@pytest.mark.parametrize("case", BAD_FILES)
def test_data_file(tmp_path: Path, say: Callable[..., str], case: str):
    bad = BAD_FILES[case]
    file = tmp_path / bad.name
    file.write_bytes(bad.data)
    report = tmp_path / "data_report.json"
    report.write_text("old")
    check(say("check_data", "--dataset_name", file, "--report", report), bad.message.format(file=file))
    assert report.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {bad.name, "data_report.json"}


@pytest.mark.parametrize("corpus", [BAD_FILES, BAD_CONFIGS])
def test_the_corpus_is_large_enough(corpus: dict[str, Any]):
    assert len(corpus) >= 60
    assert len({bad.message for bad in corpus.values()}) >= 60


def test_data_that_is_not_there(tmp_path: Path, say: Callable[..., str]):
    (tmp_path / "notes.txt").touch()
    empty = f"--dataset_name {tmp_path}: the folder has no {SUFFIXES} file"
    assert say("check_data", "--dataset_name", tmp_path) == empty
    gone = tmp_path / "gone.jsonl"
    assert say("check_data", "--dataset_name", gone) == f"--dataset_name {gone}: no such file or folder"
    gone.symlink_to("/proc/self/mem")  # a file that even root cannot read
    assert say("check_data", "--dataset_name", gone) == f"{gone}: cannot be read: Input/output error"


def test_a_hub_dataset_without_a_network(say: Callable[..., str]):
    said = say("check_data", "--dataset_name", "nobody/nothing")
    check(said, "--dataset_name nobody/nothing (split train): …")


def test_keys_and_formats(tmp_path: Path, say: Callable[..., str]):
    file = tiny.save_pairs(tmp_path / "a.jsonl", [GOOD])
    for argv, expected in {
        "--chosen_key good": f"{file} row 1: no column 'good', named by a --…_key option (has "
        "prompt, chosen, rejected)",
        "--data_format csv": f"command line: data_format must be one of {FORMATS}, not csv",
        "--data_format orca": f"{file} row 1: column 'question' is missing; columns are prompt, chosen, rejected",
        "--dataset_train_split valid": f"--dataset_name {file}: no split valid (has train); see --val_ratio",
        "--val_ratio 0.5": "--val_ratio: the data has only one prompt, so nothing can be held out",
    }.items():
        assert say("check_data", "--dataset_name", file, *argv.split()) == expected


@pytest.fixture(scope="module")
def hostile_models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Folders that look like models, and want to run code or to read what is elsewhere."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("pickle", "elsewhere", "with_code", "nosy_template", "with_link"):
        shutil.copytree(tiny_model, folder / name)
    (folder / "with_link" / "notes.txt").symlink_to("/etc/passwd")
    boom = pickle.dumps(_Boom(folder / "boom"))
    (folder / "pickle" / "model.safetensors").unlink()
    (folder / "pickle" / "pytorch_model.bin").write_bytes(boom)
    (folder / "elsewhere" / "model.safetensors").rename(folder / "elsewhere" / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "../../secret.bin"}}
    (folder / "elsewhere" / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((tiny_model / "config.json").read_text())
    code = {"model_type": "boom", "auto_map": {"AutoConfig": "boom.Config", "AutoModelForCausalLM": "boom.Model"}}
    (folder / "with_code" / "config.json").write_text(json.dumps(config | code))
    (folder / "with_code" / "boom.py").write_text(f"open({str(folder / 'boom')!r}, 'w')\n")
    (folder / "nosy_template" / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    (folder / "pickled_adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model), "task_type": "CAUSAL_LM"}
    (folder / "pickled_adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "pickled_adapter" / "adapter_model.bin").write_bytes(boom)
    return folder


class _Boom:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, tiny_data: Path, hostile_models: Path) -> dict[str, str]:
    """Names that messages and command lines refer to, with a few things that are not models."""
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "file").touch()
    for folder in hostile_models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    return {"model": str(tiny_model), "data": str(tiny_data), "tmp": str(tmp_path), "config": str(tmp_path / "c.yaml")}


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, but for the log, which may grow."""
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config(tmp_path: Path, say: Callable[..., str], inputs: dict[str, str], hostile_models: Path, case: str):
    bad = BAD_CONFIGS[case]
    argv = bad.argv.format(**inputs).split()
    if bad.yaml is not None:
        (tmp_path / "c.yaml").write_bytes(bad.yaml)
        argv += ["--config", inputs["config"]]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("old")
    (tmp_path / "out" / "config.yaml").write_text("old")
    before = contents(tmp_path)
    check(say(bad.script, *argv), bad.message.format(**inputs))
    assert contents(tmp_path) == before
    assert not (hostile_models / "boom").exists()


def test_a_pickle_is_a_trap(hostile_models: Path):
    """Or the tests above would prove nothing."""
    with open(hostile_models / "pickle" / "pytorch_model.bin", "rb") as file:
        pickle.load(file).close()
    (hostile_models / "boom").unlink()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, script, tiny_model: Path, tiny_data: Path
) -> tuple[Path, list[str]]:
    """A finished run's folder, and its command line."""
    folder = tmp_path_factory.mktemp("runs")
    argv = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {folder}/out --max_steps 1"
    argv += f" --ref_cache {folder}/reference --per_device_train_batch_size 4"
    script("dpo").main(argv.split())
    return folder / "out", argv.split()


@pytest.mark.parametrize(
    "change",
    [
        "--model_name_or_path /gone",
        "--dataset_name /gone",
        "--max_length 4",
        "--reference_model /gone",
        "--fp16",
        "--beta 3",
    ],
)
def test_a_finished_run_survives_bad_input(finished: tuple[Path, list[str]], say: Callable[..., str], change: str):
    """Even where it was to be started over: only good input takes its place."""
    folder, argv = finished
    before = contents(folder)
    starting_over = [] if change == "--beta 3" else ["--resume_from_checkpoint", "no"]
    assert say("dpo", *argv, *change.split(), *starting_over)
    assert contents(folder) == before


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, script, tiny_model: Path, tiny_data: Path
) -> tuple[Path, list[str]]:
    """A run's folder as if it had been stopped after its first step, and its command line."""
    folder = tmp_path_factory.mktemp("stopped")
    argv = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {folder}/out --max_steps 2"
    argv += f" --ref_cache {folder}/reference --per_device_train_batch_size 4 --save_steps 1"
    script("dpo").main(argv.split())
    shutil.rmtree(folder / "out" / "checkpoint-2")
    (folder / "out" / MANIFEST).unlink()
    return folder, argv.split()


@pytest.fixture
def checkpoint(stopped: tuple[Path, list[str]], tmp_path: Path) -> Iterator[Path]:
    """The stopped run's checkpoint, put back as it was afterwards."""
    folder = stopped[0] / "out" / "checkpoint-1"
    saved = shutil.copytree(folder, tmp_path / "saved")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(saved, folder)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", ["code", "half", "nothing"])
def test_a_checkpoint_runs_no_code(
    stopped: tuple[Path, list[str]], checkpoint: Path, say: Callable[..., str], name: str, content: str, named: bool
):
    """Though its manifest agrees with it: whoever wrote the one may have written the other."""
    folder, argv = stopped
    file = checkpoint / name
    whole = file.read_bytes()
    spoiled = {"code": pickle.dumps(_Boom(folder / "boom"), protocol=2), "half": whole[: len(whole) // 2]}
    file.write_bytes(spoiled.get(content, b""))
    write_manifest(checkpoint)
    left = contents(checkpoint)
    said = say("dpo", *argv, *(["--resume_from_checkpoint", checkpoint] if named else []))
    check(said, f"{file}: not the plain tensors and numbers that training saves (…")
    assert not (folder / "boom").exists()
    assert contents(checkpoint) == left


def test_the_pickle_in_a_checkpoint_is_a_trap(tmp_path: Path):
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(_Boom(tmp_path / "boom"), protocol=2))
    with contextlib.suppress(RuntimeError):  # what it has unpickled is not what torch saves
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "boom").exists()


def test_training_arguments_of_a_checkpoint_are_not_read(
    stopped: tuple[Path, list[str]], checkpoint: Path, script: Callable[[str], ModuleType]
):
    folder, argv = stopped
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(_Boom(folder / "boom")))
    write_manifest(checkpoint)
    script("dpo").main(argv)
    assert "resuming from" in (folder / "out" / "train.log").read_text()
    assert not (folder / "boom").exists()


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (AlarmStop, 3), (Preempted, 75)])
def test_exit_codes(error: type[TandemExit], code: int, capsys: pytest.CaptureFixture[str]):
    def main(argv: list[str]) -> None:
        raise error("two\n lines")

    with pytest.raises(SystemExit) as stop:
        script_main(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{error.__name__}: two lines\n"


def test_in_a_process_of_its_own(tmp_path: Path, tiny_model: Path):
    """What a user's terminal shows, to the byte."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(GOOD, GOOD | {"chosen": ""}))
    argv = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}  # a library prints it
    command = [sys.executable, str(ROOT / "scripts" / "sft.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"UserError: {file} row 2: field 'chosen': the completion is empty\n"
