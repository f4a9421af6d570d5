"""What a mirror copies, and what it asks its drive for."""

import json
from pathlib import Path

import pytest

from tandem.monitor import packs
from tandem.runs import RUN, checkpoints, is_complete, write_manifest
from tandem.training import mirror
from tandem.training.mirror import Mirror


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "LOOSE", 20)
    monkeypatch.setattr(packs, "PER_PACK", 10)
    monkeypatch.setattr(mirror, "sync", lambda file: None)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were copied, and `?name` of those that the drive was asked for."""
    names: list[str] = []
    copy, is_there = mirror.copy_file, mirror.is_there
    monkeypatch.setattr(mirror, "copy_file", lambda file, to: (names.append(file.name), copy(file, to)))
    monkeypatch.setattr(mirror, "is_there", lambda to, known: (names.append(f"?{to.name}"), is_there(to, known))[1])
    return names


def a_run(folder: Path, steps: int) -> Path:
    write(folder / RUN, json.dumps({"id": "mine"}))
    for step in range(1, steps + 1):
        write(folder / "logs" / "margins" / "epoch_001" / f"step_{step:05d}.npy", f"{step}")
    return folder


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    write(folder / RUN, json.dumps({"id": "mine"}))
    write(folder / "model.safetensors", f"of step {step}")
    write_manifest(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def save(own: Mirror) -> None:
    """As a save in training does it."""
    assert own._thread is not None
    own._thread.submit(own.copy).result()


def test_what_was_copied_is_not_asked_for_again_but_at_the_end(tmp_path: Path, copied: list[str]):
    run, own = a_run(tmp_path / "run", 3), Mirror(tmp_path / "run", tmp_path / "drive")
    checkpoint(run, 3)
    with own.in_background():
        save(own)
        assert {"step_00003.npy", "model.safetensors", "manifest.json"} < set(copied)
        copied.clear()
        a_run(run, 4)  # writes the former ones again
        checkpoint(run, 4)
        (run / "logs" / "train.log").write_text("a line")
        del copied[:]
        save(own)
        save(own)
    once = {name for name in copied if name.startswith("?")}
    assert sorted(name for name in copied if name.startswith("?")) == sorted([*once, "?run.json"])
    del copied[:]
    own.copy()
    assert [name for name in copied if not name.startswith("?")] == []
    assert "?step_00001.npy" in copied
    assert contents(tmp_path / "drive" / "run") == contents(run)


def test_a_process_that_goes_on_trusts_the_times_of_the_one_before(tmp_path: Path, copied: list[str]):
    run = a_run(tmp_path / "run", 3)
    checkpoint(run, 3)
    Mirror(run, tmp_path / "drive").copy()
    del copied[:]
    (run / "logs" / "margins" / "epoch_001" / "step_00003.npy").write_text("x")  # as long as before
    Mirror(run, tmp_path / "drive").copy()
    assert [name for name in copied if not name.startswith("?")] == ["step_00003.npy"]
    assert contents(tmp_path / "drive" / "run") == contents(run)


def test_margins_that_are_packed_while_they_are_copied_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, own = a_run(tmp_path / "run", 30), Mirror(tmp_path / "run", tmp_path / "drive")
    checkpoint(run, 30)
    copy = mirror.copy_file

    def packing(file: Path, to: Path) -> None:
        if file.name == "step_00025.npy":
            packs.close(run / "logs" / "margins" / "steps_00021_00030.npz")
        assert file.name != "manifest.json" or (to.parents[1] / "logs" / "margins" / "steps_00021_00030.npz").exists()
        copy(file, to)

    monkeypatch.setattr(mirror, "copy_file", packing)
    with own.in_background():
        save(own)
    assert contents(tmp_path / "drive" / "run") == contents(run)
    assert len(list(packs.files(tmp_path / "drive" / "run" / "logs" / "margins"))) == 20


def test_what_a_kill_has_left_of_packed_margins_goes_with_the_next_process(tmp_path: Path):
    run = a_run(tmp_path / "run", 30)
    Mirror(run, tmp_path / "drive").copy()
    packs.close(run / "logs" / "margins" / "steps_00021_00030.npz")
    drive = tmp_path / "drive" / "run" / "logs" / "margins"
    mirror.copy_file(run / "logs" / "margins" / "steps_00021_00030.npz", drive / "steps_00021_00030.npz")  # then killed
    Mirror(run, tmp_path / "drive").copy()
    assert contents(tmp_path / "drive" / "run") == contents(run)


def test_a_checkpoint_that_is_being_written_is_not_copied(tmp_path: Path):
    run, own = a_run(tmp_path / "run", 3), Mirror(tmp_path / "run", tmp_path / "drive")
    checkpoint(run, 2)
    write(run / "checkpoint-3" / "model.safetensors", "half")
    own.copy()
    assert [path.name for path in checkpoints(tmp_path / "drive" / "run")] == ["checkpoint-2"]
    checkpoint(run, 3)
    own.copy()
    assert all(is_complete(path) for path in checkpoints(tmp_path / "drive" / "run"))
    assert contents(tmp_path / "drive" / "run") == contents(run)


def test_another_lifes_checkpoint_is_never_half_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = a_run(tmp_path / "run", 3)
    checkpoint(run, 3)
    Mirror(run, tmp_path / "drive").copy()
    write(run / "checkpoint-3" / "model.safetensors", "of step X")  # as long as before
    write_manifest(run / "checkpoint-3")
    copy = mirror.copy_file

    def killed(file: Path, to: Path) -> None:
        copy(file, to)
        if file.name == "model.safetensors":
            raise InterruptedError("killed")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="killed"):
        patch.setattr(mirror, "copy_file", killed)
        Mirror(run, tmp_path / "drive").copy()
    assert not is_complete(tmp_path / "drive" / "run" / "checkpoint-3")
    Mirror(run, tmp_path / "drive").copy()
    assert contents(tmp_path / "drive" / "run") == contents(run)
