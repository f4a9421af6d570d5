"""Disks that are full or read-only, small ones made for it: one line that says so, and nothing lost."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tandem.errors import UserError
from tandem.monitor.margins import read_margins_log
from tandem.runs import LOCK, checkpoints, damage, is_complete, locked, sha256_file
from tandem.training import session


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, which the checkpoints of a tiny model soon fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def train(run_dpo_script: Callable[..., None]) -> Callable[[Path], None]:
    return lambda out: run_dpo_script(out, max_steps=10, save_steps=2, save_total_limit="none", logging_steps=1)


def result(out: Path) -> tuple[Any, ...]:
    losses = [entry.get("loss") for entry in json.loads((out / "training_metrics.json").read_text())["log_history"]]
    return sha256_file(out / "model.safetensors"), losses, read_margins_log(out / "logs" / "margins")


def test_a_full_disk_keeps_the_last_good_checkpoint(disk: Path, train: Callable[[Path], None], tmp_path: Path):
    out = disk / "out"
    with pytest.raises(UserError) as error:
        train(out)
    kept = checkpoints(out)
    assert kept and all(damage(path) is None for path in kept)  # the torn one is gone, and its room is free again
    assert f"--output_dir {out}: cannot write " in str(error.value)
    assert f": No space left on device; {kept[-1].name} is the last good one; put that right, and " in str(error.value)
    with pytest.raises(UserError, match=f"{kept[-1].name} is the last good one"):
        train(out)  # still full
    assert checkpoints(out) == kept and damage(kept[-1]) is None
    mount("-o", "remount,size=64m", str(disk))
    train(out)
    assert f"resuming from {kept[-1]}" in (out / "train.log").read_text()
    train(tmp_path / "straight")
    assert result(out) == result(tmp_path / "straight")


def test_a_disk_that_turns_read_only(disk: Path, train: Callable[[Path], None], tmp_path: Path):
    mount("-o", "remount,size=64m", str(disk))
    out = disk / "out"

    class ReadOnly(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                os.sync()
                mount("-o", "remount,ro", str(disk))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.training.session.RateProgress", lambda unit: ReadOnly())
        # An open file keeps a disk from turning read-only
        patch.setattr("tandem.training.session.logging_to", lambda folder: contextlib.nullcontext())
        with pytest.raises(UserError, match="Read-only file system; checkpoint-4 is the last good one; put that right"):
            train(out)
    with pytest.raises(UserError, match=f"--output_dir {out}: cannot write .*Read-only file system; checkpoint-4 is"):
        train(out)
    mount("-o", "remount,rw", str(disk))
    train(out)
    train(tmp_path / "straight")
    assert result(out) == result(tmp_path / "straight")


def test_a_read_only_output(disk: Path, train: Callable[[Path], None]):
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(UserError, match=r"cannot write .*out: Read-only file system; no checkpoint was saved yet"):
        train(disk / "out")
    assert not is_complete(disk / "out")


def test_a_folder_in_use_is_left_alone(train: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "GOING_AWAY", 0.2)
    out = tmp_path / "out"
    with locked(out):
        with pytest.raises(UserError, match=f"{out}: process {os.getpid()} on .+ is writing there"):
            train(out)
        assert [path.name for path in out.iterdir()] == [LOCK]
    train(out)
    assert is_complete(out) and LOCK not in (out / "manifest.json").read_text()
