"""Beyond 10,000 steps a thousand arrays are one file: the same content, wherever a kill comes."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.monitor import packs
from tandem.monitor.margins import MarginsLog, read_margins, read_margins_log
from tandem.monitor.tail import TailRecord
from tandem.runs import append_jsonl

Content = dict[str, list[tuple[str, float]]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of 10 steps after 20, and no waiting for the disk."""
    monkeypatch.setattr(packs, "LOOSE", 20)
    monkeypatch.setattr(packs, "PER_PACK", 10)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(folder: Path, steps: range, *, again: float = 0.0) -> None:
    """Log steps, 15 in an epoch; `again` is added to what another life of the run would write."""
    log = MarginsLog(folder)
    log.truncate_after(steps.start - 1)
    for step in steps:
        margins = np.array([step, -step], np.float32) + np.float32(again)
        log.write_step(1 + (step - 1) // 15, step, ["a", f"pair {step}"], margins, TailRecord(beta=0.1, tau=None))
    log.flush()


def content(folder: Path) -> Content:
    """What every reader sees: each record's array."""
    return {record["npy"]: read_margins(folder / record["npy"]).tolist() for record in read_margins_log(folder)[0]}


def names(folder: Path) -> tuple[list[str], list[int]]:
    return [pack.name for pack in packs.packs(folder)], sorted(step for step, _ in packs.files(folder))


def test_a_step_belongs_to_its_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = {step: packs.pack_of(Path(), step) for step in (1, 10_000, 10_001, 11_000, 11_001, 100_000)}
    assert [pack and pack.name for pack in found.values()] == [
        None, None, "steps_10001_11000.npz", "steps_10001_11000.npz", "steps_11001_12000.npz", "steps_99001_100000.npz",
    ]  # fmt: skip


def test_closed_thousands_are_packed_and_the_first_steps_are_not(tmp_path: Path) -> None:
    write(tmp_path, range(1, 47))
    assert names(tmp_path) == (["steps_00021_00030.npz", "steps_00031_00040.npz"], [*range(1, 21), *range(41, 47)])
    assert not (tmp_path / "epoch_002" / "step_00029.npy").exists()
    assert content(tmp_path)["epoch_002/step_00029.npy"] == [("a", 29.0), ("pair 29", -29.0)]
    with np.load(tmp_path / "steps_00021_00030.npz") as packed:  # as NumPy itself reads it
        assert packed["epoch_002/step_00029"].tolist() == [("a", 29.0), ("pair 29", -29.0)]
    with pytest.raises(FileNotFoundError):
        read_margins(tmp_path / "epoch_004" / "step_00047.npy")


def test_unpacked_is_what_was_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "packed", range(1, 41))
    monkeypatch.setattr(packs, "LOOSE", 100)
    write(tmp_path / "files", range(1, 41))
    packs.main([str(tmp_path / "packed")])
    assert capsys.readouterr().out == "20 arrays have files of their own again\n"
    for file in (tmp_path / "files").rglob("*.*"):
        assert (tmp_path / "packed" / file.relative_to(tmp_path / "files")).read_bytes() == file.read_bytes()
    assert not packs.packs(tmp_path / "packed")
    with pytest.raises(UserError, match="a margins folder"):
        packs.main([str(tmp_path / "nowhere")])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(killed_at=st.integers(0, 16), resumed_at=st.integers(0, 16))
def test_a_resumed_run_has_the_content_of_one_that_was_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, killed_at: int, resumed_at: int
) -> None:
    monkeypatch.setattr(packs, "LOOSE", 6)
    monkeypatch.setattr(packs, "PER_PACK", 3)
    folder, kept = tmp_path_factory.mktemp("margins"), min(resumed_at, killed_at)
    write(folder, range(1, 1 + killed_at), again=0.5)
    MarginsLog(folder).truncate_after(kept)
    assert len(content(folder)) == kept
    assert len(list(packs.files(folder))) == kept - sum(len(np.load(pack).files) for pack in packs.packs(folder))
    write(folder, range(kept + 1, 18))
    for array in content(folder).values():
        step = int(array[1][0].removeprefix("pair "))
        assert array[1][1] == -step + (0.5 if step <= kept else 0.0)
    assert names(folder)[0] == ["steps_00007_00009.npz", "steps_00010_00012.npz", "steps_00013_00015.npz"]
    assert names(folder)[1] == [1, 2, 3, 4, 5, 6, 16, 17]


@pytest.mark.parametrize("removed", range(11))
def test_a_kill_between_packing_and_removing_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    write(tmp_path / "straight", range(1, 36))
    calls = iter(range(100))
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".npy" and next(calls) == removed:
            raise InterruptedError("killed")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        if removed < 10:
            with pytest.raises(InterruptedError):
                write(tmp_path / "killed", range(1, 31))
        else:
            write(tmp_path / "killed", range(1, 31))
    before = content(tmp_path / "killed")
    assert len(before) == 30
    write(tmp_path / "killed", range(31, 36))
    assert content(tmp_path / "killed") == before | content(tmp_path / "straight")
    assert names(tmp_path / "killed") == names(tmp_path / "straight")


def test_a_run_of_before_packs_is_packed_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packs, "LOOSE", 1000)
        write(tmp_path, range(1, 46))
    before = content(tmp_path)
    write(tmp_path, range(46, 48))
    assert names(tmp_path) == (["steps_00021_00030.npz", "steps_00031_00040.npz"], [*range(1, 21), *range(41, 48)])
    assert before.items() < content(tmp_path).items()


def test_a_thousand_whose_last_step_had_nothing_to_log_is_closed(tmp_path: Path) -> None:
    write(tmp_path, range(1, 30))
    write(tmp_path, range(31, 33))
    assert names(tmp_path) == (["steps_00021_00030.npz"], [*range(1, 21), 31, 32])


def test_a_damaged_pack_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 32))
    pack = tmp_path / "steps_00021_00030.npz"
    pack.write_bytes(pack.read_bytes()[:100])
    with pytest.raises(UserError, match=r"steps_00021_00030\.npz: not the margins"):
        read_margins(tmp_path / "epoch_002" / "step_00022.npy")


def test_what_else_lies_in_a_pack_or_beside_one_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 31))
    with zipfile.ZipFile(tmp_path / "steps_00021_00030.npz", "a") as packed:
        packed.writestr("../outside.npy", b"of someone else")
    (tmp_path / "steps_mine.npz").write_bytes(b"mine")
    append_jsonl(tmp_path / "notes.jsonl", {"mine": 1})
    packs.unpack(tmp_path)
    assert not (tmp_path.parent / "outside.npy").exists()
    assert (tmp_path / "steps_mine.npz").exists() and (tmp_path / "notes.jsonl").exists()
