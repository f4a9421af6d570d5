"""The margins folder, whole and torn."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tandem.monitor.margins import MarginsLog, read_margins, read_margins_log, summary
from tandem.monitor.tail import TailRecord

WARM = TailRecord(beta=0.1, tau=None)


def write(log: MarginsLog, steps: range) -> None:
    for step in steps:
        log.write_step(1 + step // 4, step, ["a", "b"], np.array([step, -step], np.float32), WARM)
        if step == 2:
            log.write_warmup_end(1, 2, 0.5, 0.1)
    log.flush()


def test_summary_by_hand() -> None:
    # mean 2, deviations −2 … 2: variance (4+1+0+1+4)/5 = 2; ranks 0.4 and 3.6 of 0 … 4
    assert summary(np.array([0.0, 1, 2, 3, 4])) == {
        "mean": 2.0,
        "std": pytest.approx(2**0.5),
        "min": 0.0,
        "p10": pytest.approx(0.4),
        "median": 2.0,
        "p90": pytest.approx(3.6),
        "max": 4.0,
        "positive": 0.8,
    }
    assert summary(np.array([np.nan, 1.0]))["mean"] == 1.0
    assert set(summary(np.array([np.nan])).values()) == {None}


def test_a_step_is_a_record_and_an_array(tmp_path: Path) -> None:
    log = MarginsLog(tmp_path)
    tail = TailRecord(beta=0.2, tau=0.75, p_hat=0.5, over=True)
    record = log.write_step(2, 12, ["x", "longer"], np.array([0.5, 1.5], np.float32), tail)
    log.flush()
    assert json.loads((tmp_path / "margins_log.jsonl").read_text()) == record
    fields = "epoch step n mean std min p10 median p90 max positive tau p_hat over beta npy"
    assert " ".join(record) == fields
    assert record["npy"] == "epoch_002/step_00012.npy"
    assert (record["tau"], record["p_hat"], record["over"], record["beta"]) == (0.75, 0.5, True, 0.2)
    array = read_margins(tmp_path / record["npy"])
    assert array["pair_id"].tolist() == ["x", "longer"]
    assert array["margin"].tolist() == [0.5, 1.5]
    assert array["margin"].dtype == np.float32


def test_a_kill_in_a_record_loses_only_that_step(tmp_path: Path) -> None:
    log = MarginsLog(tmp_path)
    write(log, range(1, 4))
    whole = log.path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        log.path.write_bytes(whole[:-cut])
        steps, events = read_margins_log(tmp_path)
        assert [r["step"] for r in steps] == [1, 2]
        assert [e["tau0"] for e in events] == [0.5]


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 8])
def test_a_resumed_log_has_no_gap_and_no_repeat(tmp_path: Path, cut: int) -> None:
    write(MarginsLog(tmp_path / "whole"), range(1, 9))
    killed = MarginsLog(tmp_path / "killed")
    write(killed, range(1, 7))
    killed.path.write_bytes(killed.path.read_bytes() + b'{"epoch": 2, "step": 7, "n"')
    (killed.folder / "epoch_002" / "step_00007.npy").write_bytes(b"its record never came")

    resumed = MarginsLog(tmp_path / "killed")
    resumed.truncate_after(cut)
    left = [int(path.stem[5:]) for path in resumed.folder.rglob("*.npy")]
    assert all(step <= cut for step in left)
    write(resumed, range(min(cut, 6) + 1, 9))
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_cutting_back_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is listed a few times however many of its files go; after each file it would be quadratic."""
    folder = tmp_path / "epoch_001"
    folder.mkdir()
    for step in range(1, 301):
        (folder / f"step_{step:05d}.npy").touch()
    listings: list[object] = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listings.append(path) or iterdir(path))
    MarginsLog(tmp_path).truncate_after(100)
    assert len(listings) <= 1
    assert len(os.listdir(folder)) == 100
    MarginsLog(tmp_path).truncate_after(0)
    assert not folder.exists()


def test_truncating_nothing(tmp_path: Path) -> None:
    MarginsLog(tmp_path / "new").truncate_after(0)
    assert read_margins_log(tmp_path / "new") == ([], [])


def test_a_full_disk_is_not_overlooked(tmp_path: Path) -> None:
    (tmp_path / "epoch_001").write_text("a file where the folder should be")
    log = MarginsLog(tmp_path)
    log.write_step(1, 1, ["a"], np.zeros(1, np.float32), WARM)
    with pytest.raises(OSError, match="epoch_001"):
        log.write_step(1, 2, ["a"], np.zeros(1, np.float32), WARM)
    assert read_margins_log(tmp_path) == ([], [])
