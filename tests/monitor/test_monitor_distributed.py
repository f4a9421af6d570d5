"""Two real processes (gloo) against one, on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from safetensors import safe_open

from tandem.monitor.margins import read_margins, read_margins_log
from tandem.runs import read_jsonl
from tests.monitor.fake_ranks import CASES, margin, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("fake_ranks.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def rank_file(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank_{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_what_one_logs(two: Path, tmp_path: Path, case: str) -> None:
    run(tmp_path, Accelerator(cpu=True), **CASES[case] | {"even": True, "resume_after": None})
    ours, theirs = two / case / "margins", tmp_path / "margins"
    assert (ours / "margins_log.jsonl").read_bytes() == (theirs / "margins_log.jsonl").read_bytes()
    arrays = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*.npy"))
    assert arrays == sorted(str(path.relative_to(ours)) for path in ours.rglob("*.npy"))
    for array in arrays:
        assert np.array_equal(read_margins(ours / array), read_margins(theirs / array))
    assert rank_file(two / case, 0)["states"] == rank_file(tmp_path, 0)["states"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_state(two: Path, case: str) -> None:
    assert rank_file(two / case, 0)["states"] == rank_file(two / case, 1)["states"]


@pytest.mark.parametrize("case", CASES)
def test_each_pair_once_with_its_margin(two: Path, case: str) -> None:
    steps, _ = read_margins_log(two / case / "margins")
    for epoch in (1, 2):
        records = [record for record in steps if record["epoch"] == epoch]
        seen = [read_margins(two / case / "margins" / record["npy"]) for record in records]
        expected = [f"p{i % CASES[case].get('ids', 1000)}" for i in range(CASES[case]["pairs"])]
        assert sorted(np.concatenate(seen)["pair_id"]) == sorted(expected)
        for record, array in zip(records, seen, strict=True):
            assert len(set(array["pair_id"])) == len(array) == record["n"]
            for pair, value in array:
                assert value == pytest.approx(margin(str(pair), record["step"] - 1), abs=1e-6)


def test_system_of_every_rank_reaches_rank_0(two: Path) -> None:
    logs, other = (rank_file(two / "full", rank)["logs"] for rank in (0, 1))
    assert {key.split("/")[1] for key in logs if key.startswith("system/")} == {"rank_0", "rank_1"}
    assert other == {}
    devices = json.loads((two / "full" / "devices.json").read_text())
    assert list(devices) == ["0", "1"]


def test_all_ranks_stop_for_one(two: Path) -> None:
    for rank in (0, 1):
        message, saved = rank_file(two / "stop", rank)
        assert "margin is nan (pairs b1); saved a checkpoint of step 1" in message
        assert saved == [1]
    (alarm,) = read_jsonl(two / "stop" / "alarms.jsonl")
    assert (alarm["step"], alarm["pair_ids"]) == (2, ["b1"])
    assert alarm["batches"] == ["alarms/step_00002_rank_1_micro_0.safetensors"]
    with safe_open(two / "stop" / alarm["batches"][0], "pt") as file:
        assert file.metadata() == {"pair_ids": '["b1"]'}
