"""Two processes that are told to go, that lose one of them, that are started again; one tracker run of them all."""

import json
import os
import re
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tandem.monitor.margins import read_margins_log
from tandem.runs import checkpoints, is_complete, read_jsonl, sha256_file
from tests.distributed.kills import Kill, Run
from tests.distributed.ranks import flags, ranks_of, script, start, torchrun

STEPS = 24


def options(model: Path, data: Path, cache: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "ref_cache": cache,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "save_steps": 6,
        "use_peft": "true",
        "lora_dropout": 0.3,
        "disable_dropout": "false",  # so that every rank's random numbers count
    }
    return flags(**given | changes)


def steps(out: Path) -> list[dict[str, Any]]:
    log, _ = read_margins_log(out / "logs" / "margins")
    return [{name: record.get(name) for name in ("step", "n", "mean", "p90", "tau", "beta")} for record in log]


def weights(out: Path) -> str:
    return sha256_file(out / "adapter_model.safetensors")


def wait_for_step(out: Path, step: int, process: Any) -> None:
    while len(read_jsonl(out / "logs" / "margins" / "margins_log.jsonl")) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run = start(torchrun(script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out)))
    screen, _ = run.communicate()
    assert run.returncode == 0, screen
    assert len(steps(out)) == STEPS
    return out


def told_step(screen: str) -> int:
    told = re.search(r"Preempted: stopped by SIGTERM after step (\d+); the same command goes on there", screen)
    assert told, screen
    return int(told[1])


def test_three_kills_and_a_sigterm(tmp_path: Path, undisturbed: Path, tiny_model: Path, tiny_data: Path, cache: Path):
    """Of a rank, of the launcher and of all; then a notice, to which both ranks save a checkpoint of the same step.

    In the end there are the weights and logs of the run that nobody disturbed, and TensorBoard has each step once.
    """
    out = tmp_path / "out"
    command = torchrun(script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out, report_to="tensorboard"))
    run = Run(command, tmp_path, cache, seed=0)
    run.killed(Kill("out", "step", "rank 1", nth=8))
    run.killed(Kill("out", "save", "launcher"))
    run.killed(Kill("out", "step", "everything", nth=4))

    noticed = start(command)
    wait_for_step(out, 16, noticed)
    noticed.send_signal(signal.SIGTERM)
    screen, _ = noticed.communicate(timeout=120)
    assert noticed.returncode == 75, screen
    assert checkpoints(out)[-1].name == f"checkpoint-{told_step(screen)}"
    assert is_complete(checkpoints(out)[-1])
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoints(out)[-1].iterdir()}

    run.finish()
    assert weights(out) == weights(undisturbed)
    assert steps(out) == steps(undisturbed)
    accumulator = EventAccumulator(str(out / "logs" / "tensorboard")).Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == list(range(1, STEPS + 1))
    for rank in (0, 1):
        assert len(accumulator.Scalars(f"train/system/rank_{rank}/allocated_gib")) == STEPS
    devices = accumulator.Tensors("devices/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "rank_0: " in devices and "rank_1: " in devices


@pytest.mark.slow
def test_a_preempted_run_goes_on_in_the_same_tracker_runs(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, cache: Path
):
    out = tmp_path / "out"
    command = torchrun(
        script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out, report_to=["wandb", "trackio"])
    )
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    first = start(command, **environment)
    wait_for_step(out, 8, first)
    first.send_signal(signal.SIGTERM)
    screen, _ = first.communicate(timeout=120)
    assert first.returncode == 75, screen
    second = start(command, **environment)
    screen, _ = second.communicate(timeout=120)
    assert second.returncode == 0, screen
    run_id = json.loads((out / "run.json").read_text())["id"]
    runs = {path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*")}
    assert runs == {run_id}  # a file per start, which `wandb sync` puts into one run
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as trackio:
        names = {name for (name,) in trackio.execute("SELECT DISTINCT run_name FROM metrics")}
    assert names == {f"out-{run_id[:8]}"}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_tracked_run_and_it_goes_on_in_place(
    tmp_path: Path, tiny_model: Path, tiny_data: Path, cache: Path, rank: int
):
    """No tracker keeps the other rank or the launcher waiting, and the same command writes the same tracker runs on."""
    out = tmp_path / "out"
    trackers = ["wandb", "trackio", "tensorboard"]
    command = torchrun(script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out, report_to=trackers))
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "trackio")}
    first = start(command, **environment)
    wait_for_step(out, 8, first)
    ranks_of(first.pid)[rank].kill()
    screen, _ = first.communicate(timeout=30)
    assert first.returncode not in (0, 75), screen
    second = start(command, **environment)
    screen, _ = second.communicate(timeout=120)
    assert second.returncode == 0, screen
    assert f"resuming from {out}/checkpoint-6" in screen
    run_id = json.loads((out / "run.json").read_text())["id"]
    assert {path.name.rpartition("-")[2] for path in (out / "wandb").glob("offline-run-*")} == {run_id}
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as trackio:
        names = {name for (name,) in trackio.execute("SELECT DISTINCT run_name FROM metrics")}
    assert names == {f"out-{run_id[:8]}"}
    accumulator = EventAccumulator(str(out / "logs" / "tensorboard")).Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again(
    tmp_path: Path, undisturbed: Path, tiny_model: Path, tiny_data: Path, cache: Path
):
    """torchrun's elastic restart: one command, one rank killed, the same weights and logs in the end."""
    out = tmp_path / "out"
    command = torchrun(script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out))
    command.insert(command.index("--nproc_per_node"), "--max-restarts=1")
    run = start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_step(out, 8, run)
    ranks_of(run.pid)[1].kill()
    screen, _ = run.communicate(timeout=180)
    assert run.returncode == 0, screen
    assert f"resuming from {out}/checkpoint-6" in screen
    assert weights(out) == weights(undisturbed)
    assert steps(out) == steps(undisturbed)


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path, tiny_model: Path, tiny_data: Path, cache: Path):
    """Else they would go on writing beside the same command's new ones."""
    out = tmp_path / "out"
    run = start(torchrun(script("dpo"), *options(tiny_model, tiny_data, cache, output_dir=out, max_steps=100_000)))
    wait_for_step(out, 1, run)
    ranks = ranks_of(run.pid)
    assert len(ranks) == 2
    run.kill()
    run.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert len(gone) == 2 and not alive


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path: Path, tiny_model: Path, tiny_data: Path, cache: Path):
    """The second is told of the first, which goes on; killed with SIGKILL, that one is no longer in the way."""
    out = tmp_path / "out"
    endless = options(tiny_model, tiny_data, cache, output_dir=out, max_steps=100_000)
    first = start(torchrun(script("dpo"), *endless))
    wait_for_step(out, 1, first)
    second = start(torchrun(script("dpo"), *endless))
    screen, _ = second.communicate(timeout=120)
    assert second.returncode == 2, screen
    told = f"UserError: {out}: process {ranks_of(first.pid)[0].pid} on {socket.gethostname()} is writing there"
    assert told in screen, screen
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    psutil.wait_procs(ranks_of(first.pid))
    first.communicate()
    anew = options(tiny_model, tiny_data, cache, output_dir=out, max_steps=2, resume_from_checkpoint="no")
    third = start([sys.executable, script("dpo"), *anew])
    screen, _ = third.communicate(timeout=120)
    assert third.returncode == 0, screen
    assert is_complete(out)
    assert ".lock" not in (out / "manifest.json").read_text()
