"""`--mount_dir`: a mirror that brings a run back on a fresh machine, and never loses another's."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback

from tandem.errors import UserError
from tandem.monitor import packs
from tandem.monitor.margins import read_margins, read_margins_log
from tandem.runs import MANIFEST, RUN, checkpoints, is_complete, sha256_file
from tandem.training.trainers import checkpoints as checkpoints_module

Train = Callable[..., Path]


class Lost(Exception):
    pass


@pytest.fixture
def train(
    script: Callable[[str], ModuleType],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Train:
    """`train(lost_at=5, flag=value, …)`: six steps of DPO in `vm/dpo`, mirrored in `drive/dpo`; the machine is lost at
    the start of that step, with all that was on it."""
    out = tmp_path / "vm" / "dpo"

    def run(lost_at: int | None = None, **flags: Any) -> Path:
        class LoseAt(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step + 1 == lost_at:
                    raise Lost

        monkeypatch.setattr("tandem.training.session.RateProgress", lambda unit: LoseAt())
        options: dict[str, Any] = {
            "model_name_or_path": tiny_model,
            "dataset_name": tiny_data,
            "ref_cache": tmp_path / "cache",
            "output_dir": out,
            "mount_dir": tmp_path / "drive",
            "bf16": "false",
            "use_peft": "true",
            "gradient_checkpointing": "false",
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "max_steps": 6,
            "save_steps": 2,
        }
        options |= flags
        script("dpo").main([part for name, value in options.items() for part in (f"--{name}", str(value))])
        return Path(options["output_dir"])

    return run


def run_id(folder: Path) -> str:
    return json.loads((folder / RUN).read_text())["id"]


def lose_machine(tmp_path: Path) -> None:
    for _ in range(50):  # what a process that was stopped in the midst of a save had handed on may still be written
        shutil.rmtree(tmp_path / "vm", ignore_errors=True)
        if not (tmp_path / "vm").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{tmp_path}/vm is still written to")


def steps(out: Path) -> list[int]:
    logs = json.loads((out / "training_metrics.json").read_text())["log_history"]
    return [log["step"] for log in logs if "loss" in log]


def result(out: Path) -> tuple[str, list[float]]:
    logs = json.loads((out / "training_metrics.json").read_text())["log_history"]
    return sha256_file(out / "adapter_model.safetensors"), [log["loss"] for log in logs if "loss" in log]


def log(out: Path) -> str:
    return (out / "train.log").read_text()


@pytest.fixture
def straight(train: Train, tmp_path: Path) -> tuple[str, list[float]]:
    return result(train(output_dir=tmp_path / "straight", mount_dir=tmp_path / "other_drive"))


def test_a_lost_machine_goes_on_from_its_mirror(train: Train, tmp_path: Path, straight: tuple[str, list[float]]):
    with pytest.raises(Lost):
        train(lost_at=4)
    lose_machine(tmp_path)
    with pytest.raises(Lost):
        train(lost_at=6)
    assert f"resuming from {tmp_path}/vm/dpo/checkpoint-2" in log(tmp_path / "vm" / "dpo")
    lose_machine(tmp_path)
    out = train()
    assert f"resuming from {out}/checkpoint-4" in log(out)
    assert result(out) == straight
    mirror = tmp_path / "drive" / "dpo"
    assert is_complete(mirror) and run_id(mirror) == run_id(out)
    assert [path.name for path in checkpoints(mirror)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(is_complete(path) for path in checkpoints(mirror))


def test_a_finished_run_comes_back_whole(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = result(train())
    lose_machine(tmp_path)
    out = train(lost_at=1)
    assert "already trained with these settings" in capsys.readouterr().err
    assert is_complete(out) and result(out) == before
    assert [path.name for path in checkpoints(tmp_path / "drive" / "dpo")] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"beta": 0.5}, "is the mirror of a run with other settings (beta was 0.1, is 0.5)"),
        ({"resume_from_checkpoint": "no"}, "is the mirror of another run"),
    ],
)
def test_another_run_is_refused_and_the_mirror_kept(
    train: Train, tmp_path: Path, flags: dict[str, Any], says: str, script: Callable[[str], ModuleType]
):
    train()
    lose_machine(tmp_path)
    before = contents(tmp_path / "drive")
    with pytest.raises(UserError) as error:
        train(**flags)
    assert says in str(error.value) and str(tmp_path / "drive" / "dpo") in str(error.value)
    assert contents(tmp_path / "drive") == before
    assert not (tmp_path / "vm" / "dpo").exists()


def test_two_runs_of_one_name_do_not_share_a_mirror(train: Train, tmp_path: Path):
    train()
    before = contents(tmp_path / "drive")
    elsewhere = tmp_path / "elsewhere" / "dpo"
    train(output_dir=elsewhere, mount_dir=tmp_path / "other_drive", seed=7)
    with pytest.raises(UserError, match="is the mirror of another run"):
        train(output_dir=elsewhere, seed=7)
    assert contents(tmp_path / "drive") == before


def test_what_no_run_has_mirrored_is_left_alone(train: Train, tmp_path: Path):
    drive = tmp_path / "drive" / "dpo"
    drive.mkdir(parents=True)
    (drive / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no run's mirror"):
        train()
    shutil.rmtree(drive)
    with pytest.raises(Lost):
        train(lost_at=4)
    kept = drive / "checkpoint-1"
    kept.mkdir()
    (kept / "model.safetensors").write_bytes(b"of a stock trainer")
    (drive / "checkpoint-best").mkdir()
    train(save_total_limit=1)
    assert (kept / "model.safetensors").exists() and (drive / "checkpoint-best").exists()
    assert [path.name for path in checkpoints(drive)] == ["checkpoint-1", "checkpoint-6"]


def test_starting_over_takes_the_mirror_along(train: Train, tmp_path: Path):
    first = run_id(train())
    with pytest.raises(Lost):
        train(lost_at=2, resume_from_checkpoint="no", seed=7)
    with pytest.raises(Lost):  # started over twice, killed before it could say so
        (tmp_path / "drive" / "dpo" / RUN).write_text(json.dumps({"id": first}))
        train(lost_at=4, resume_from_checkpoint="no", seed=7)
    mirror = tmp_path / "drive" / "dpo"
    assert [path.name for path in checkpoints(mirror)] == ["checkpoint-2"] and not is_complete(mirror)
    assert run_id(mirror / "checkpoint-2") == run_id(tmp_path / "vm" / "dpo") != first
    lose_machine(tmp_path)
    out = train(seed=7)
    assert f"resuming from {out}/checkpoint-2" in log(out)


def test_checkpoints_that_only_the_mirror_has_left(train: Train, tmp_path: Path, straight: tuple[str, list[float]]):
    with pytest.raises(Lost):
        train(lost_at=5)
    out = tmp_path / "vm" / "dpo"
    for checkpoint in checkpoints(out):
        shutil.rmtree(checkpoint)
    assert result(train()) == straight
    assert f"resuming from {out}/checkpoint-4" in log(out)


def test_a_copy_that_was_cut_off_is_made_whole(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from tandem.training.mirror import Mirror

    copy = Mirror.copy

    def full(self: Mirror) -> None:
        with self._errors(self.folder):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "copy", lambda self: copy(self) if not (self.source / MANIFEST).exists() else full(self))
        with pytest.raises(
            UserError, match=r"--mount_dir .*drive: cannot write .*: No space left on device; what .* is"
        ):
            train()
    mirror = tmp_path / "drive" / "dpo"
    assert not is_complete(mirror)
    out = train(lost_at=1)
    assert "already trained" in capsys.readouterr().err
    assert is_complete(mirror) and contents(mirror) == contents(out)


def test_a_model_made_anew_under_the_same_name_is_another(train: Train, tmp_path: Path, tiny_model: Path):
    from tandem.models.merge import MergeOptions, merge

    merge(MergeOptions(str(tiny_model), str(tmp_path / "sft")))
    with pytest.raises(Lost):
        train(lost_at=4, model_name_or_path=tmp_path / "sft")
    other = train(output_dir=tmp_path / "other", mount_dir=tmp_path / "other_drive")
    merge(MergeOptions(str(other), str(tmp_path / "sft")))
    with pytest.raises(UserError, match="model_content was"):
        train(model_name_or_path=tmp_path / "sft")
    lose_machine(tmp_path)
    with pytest.raises(UserError, match="model_content was"):
        train(model_name_or_path=tmp_path / "sft")


def test_killed_after_the_last_step_trains_none_more(train: Train, tmp_path: Path, straight: tuple[str, list[float]]):
    """The last step is no end of an epoch: transformers would begin another step before it looks at max_steps."""
    out = train()
    (out / MANIFEST).unlink()
    (out / "adapter_model.safetensors").rename(out / ".tmpa1B2c3")  # as safetensors has it while it writes
    card = (out / "README.md").read_bytes()
    (out / "README.md").write_bytes(bytes(len(card)))  # after a power cut
    assert result(train(mount_dir=tmp_path / "other")) == straight
    assert steps(out) == [1, 2, 3, 4, 5, 6]
    assert not list(out.glob(".tmp*"))
    assert (out / "README.md").read_bytes() == card
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_kill_while_the_mirror_was_claimed_does_not_make_it_anothers(train: Train, tmp_path: Path):
    mirror = tmp_path / "drive" / "dpo"
    mirror.mkdir(parents=True)
    (mirror / ".run.json.tmp").write_text('{"id"')
    assert is_complete(train(max_steps=1)) and is_complete(mirror)


def test_what_is_copied_is_on_the_disk_before_it_has_its_name(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, unsynced = set(), []
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(source: str, target: str) -> None:
        if os.stat(source).st_ino not in synced:
            unsynced.append(str(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    out = train(max_steps=2)
    assert synced and unsynced == []
    # A power cut takes nothing from what is finished, the model's card and training_args.bin included
    for folder in (out, out / "checkpoint-2"):
        lost = [file.name for file in folder.iterdir() if file.is_file() and file.stat().st_ino not in synced]
        assert set(lost) <= {"train.log"}


def test_a_checkpoint_that_a_kill_kept_from_being_removed_goes_with_the_next_command(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the last save there is no other that would remove it."""
    options = {"save_total_limit": 1, "save_steps": 3}
    straight = metrics(train(output_dir=tmp_path / "straight", mount_dir=tmp_path / "other", **options))

    def killed(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        raise Lost

    with monkeypatch.context() as patch, pytest.raises(Lost):
        patch.setattr("tandem.training.trainers.checkpoints.discard", killed)
        train(**options)
    out = tmp_path / "vm" / "dpo"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3", "checkpoint-6"]
    assert metrics(train(**options)) == straight
    for folder in (out, tmp_path / "drive" / "dpo"):
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-6"]


def test_training_does_not_wait_for_a_slow_drive(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The copy of the first save ends when the next save comes; else it would wait for ever. Before a checkpoint is
    removed its copy is whole, and after a kill's exception too."""
    from tandem.training import mirror

    copy, remove, removed = mirror.copy_file, checkpoints_module.discard, []
    mirrored = tmp_path / "drive" / "dpo"

    def slow(file: Path, to: Path) -> None:
        if to.parent.name == "checkpoint-2":
            for _ in range(1000):
                if (tmp_path / "vm" / "dpo" / "checkpoint-4" / MANIFEST).exists():
                    break
                time.sleep(0.02)
            else:
                raise AssertionError("training waits for the drive")
        copy(file, to)

    def watched(folder: Path) -> None:
        removed.append(folder.name)
        assert is_complete(mirrored / folder.name)
        remove(folder)

    monkeypatch.setattr(mirror, "copy_file", slow)
    monkeypatch.setattr(checkpoints_module, "discard", watched)
    with pytest.raises(Lost):
        train(lost_at=5, save_total_limit=1)
    assert removed == ["checkpoint-2"]
    assert [path.name for path in checkpoints(mirrored) if is_complete(path)] == ["checkpoint-4"]


def test_a_full_drive_ends_training_soon(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tandem.training import mirror

    def full(file: Path, to: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mirror, "copy_file", full)
    with pytest.raises(UserError, match=r"--mount_dir .*drive: cannot write .*: No space left on device; what .* is"):
        train(max_steps=1000, save_steps=2)
    assert len(checkpoints(tmp_path / "vm" / "dpo")) < 400


def test_margins_that_are_packed_come_back(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: tuple[str, list[float]]
):
    monkeypatch.setattr(packs, "LOOSE", 2)
    monkeypatch.setattr(packs, "PER_PACK", 2)
    with pytest.raises(Lost):
        train(lost_at=6, save_steps=3)
    lose_machine(tmp_path)
    out = train(save_steps=3)
    margins = contents(out / "logs" / "margins")
    assert sorted(margins) == [
        "epoch_001/step_00001.npy", "epoch_001/step_00002.npy", "margins_log.jsonl", "steps_00003_00004.npz",
        "steps_00005_00006.npz",
    ]  # fmt: skip
    assert contents(tmp_path / "drive" / "dpo" / "logs" / "margins") == margins
    records, _ = read_margins_log(out / "logs" / "margins")
    assert [len(read_margins(out / "logs" / "margins" / record["npy"])) for record in records] == [4] * 6
    assert result(out) == straight


def metrics(out: Path) -> dict[str, float]:
    found = json.loads((out / "training_metrics.json").read_text())["train"]
    return {name: value for name, value in found.items() if "runtime" not in name and "per_second" not in name}
