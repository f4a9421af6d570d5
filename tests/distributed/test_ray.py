"""The scripts under Ray Train on a local cluster. Needs the extra `ray`; the command line is tested without."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs

from tandem.errors import UserError
from tandem.launch.ray import launch
from tandem.monitor.margins import read_margins_log
from tandem.runs import checkpoints, damage, read_jsonl, sha256_file
from tests.distributed.ranks import flags, script, start, torchrun


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--num_workers", "0", "scripts/dpo.py"], "--num_workers must be at least 1, not 0"),
        (["--num_workers", "2"], "name the script to run"),
        (["--num_workers", "2", "--gpus_per_worker", "2", "scripts/dpo.py"], "must be 0 or 1, not 2.0"),
        (["--num_workers", "2", "--reference_workers", "1", script("sft")], "--reference_workers has no effect"),
        (["--num_workers", "2", script("dpo"), "--beta", "0.1"], "--model_name_or_path is required"),
        (["--num_workers", "2", "nowhere/dpo.py"], "nowhere/dpo.py: no such script"),
    ],
)
def test_a_wrong_command_line_starts_no_cluster(argv: list[str], told: str):
    with pytest.raises(UserError, match=told):
        launch(argv)


def options(model: Path, data: Path, folder: Path, out: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "model_name_or_path": model,
        "dataset_name": data,
        "ref_cache": folder / "cache",
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 24,
        "save_steps": 6,
        "use_peft": "true",
        "lora_dropout": 0.3,
        "disable_dropout": "false",
    }
    return flags(**given | changes)


def under_ray(*arguments: str, workers: int = 2) -> list[str]:
    return [sys.executable, script("ray_launch"), "--num_workers", str(workers), "--cpus_per_worker", "0.5", *arguments]


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    screen, _ = process.communicate(timeout=240)
    return process.returncode, screen


def workers_of(driver: int) -> list[psutil.Process]:
    """Training workers of the cluster that a driver has started on this machine."""
    return [
        process
        for process in psutil.Process(driver).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


@pytest.mark.slow
def test_a_killed_worker_leaves_no_trace(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    """Reference workers fill the cache; then a worker is killed in training; the same as two ranks of torchrun."""
    pytest.importorskip("ray")
    straight, out = tmp_path / "straight", tmp_path / "out"
    code, screen = end(start(torchrun(script("dpo"), *options(tiny_model, tiny_data, tmp_path / "a", straight))))
    assert code == 0, screen
    run = start(
        under_ray("--reference_workers", "2", script("dpo"), *options(tiny_model, tiny_data, tmp_path / "b", out))
    )
    log = out / "logs" / "margins" / "margins_log.jsonl"
    while len(read_jsonl(log)) < 8:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.01)
    workers_of(run.pid)[-1].kill()
    code, screen = end(run)
    assert code == 0, screen
    trained = (out / "train.log").read_text()
    assert "reference of train pairs: 32 of 32 in " in trained
    assert "reference of train pairs: 0 of" not in trained
    assert f"resuming from {out}/checkpoint-6" in trained
    weights = [sha256_file(folder / "adapter_model.safetensors") for folder in (straight, out)]
    assert weights[0] == weights[1]
    margins = [read_margins_log(folder / "logs" / "margins") for folder in (straight, out)]
    assert margins[0] == margins[1]
    copies = checkpoints(tmp_path / "out_ray" / "out")
    assert copies[-1].name == "checkpoint-24" and all(damage(copy) is None for copy in copies)


@pytest.mark.slow
def test_how_a_run_ends_reaches_the_command(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    """Wrong input is found by a worker: one line and exit code 2, and no second start of the training."""
    pytest.importorskip("ray")
    wrong = options(tiny_model, tiny_data, tmp_path, tmp_path / "out", max_length=4)
    code, screen = end(start(under_ray(script("dpo"), *wrong, workers=1)))
    assert code == 2, screen
    assert screen.splitlines()[-1].startswith("UserError: --max_length 4: no pair keeps any of its answers")


@pytest.mark.slow
def test_a_new_machine_gets_the_last_checkpoint_back(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    code, screen = end(
        start(under_ray(script("dpo"), *options(tiny_model, tiny_data, tmp_path, out), workers=1), RAY_DEDUP_LOGS="0")
    )
    assert code == 0, screen
    weights = sha256_file(out / "adapter_model.safetensors")
    # One worker needs no second copy of its gradients, as DDP has it
    assert re.search(r"^ +policy +whole$", (out / "train.log").read_text(), re.MULTILINE)
    os.rename(out, tmp_path / "lost")
    code, screen = end(start(under_ray(script("dpo"), *options(tiny_model, tiny_data, tmp_path, out), workers=1)))
    assert code == 0, screen
    assert f"resuming from {out}/checkpoint-24" in (out / "train.log").read_text()
    assert sha256_file(out / "adapter_model.safetensors") == weights
    before, now = (json.loads((folder / "run.json").read_text())["id"] for folder in (tmp_path / "lost", out))
    assert before == now


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket of an S3 server on this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&allow_bucket_creation=true&region=us-east-1"
    uri = f"s3://runs/tandem?{options}"
    system, path = fs.FileSystem.from_uri(uri)
    system.create_dir(path, recursive=True)
    yield uri
    server.stop()


@pytest.mark.slow
def test_checkpoints_go_to_s3_and_come_back(tmp_path: Path, tiny_model: Path, tiny_data: Path, bucket: str):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    argv = options(tiny_model, tiny_data, tmp_path, out, max_steps=12)
    command = under_ray("--storage_path", bucket, script("dpo"), *argv, workers=1)
    code, screen = end(start(command))
    assert code == 0, screen
    weights = sha256_file(out / "adapter_model.safetensors")
    system, path = fs.FileSystem.from_uri(bucket)
    copied = {info.path for info in system.get_file_info(fs.FileSelector(path, recursive=True)) if info.is_file}
    assert f"{path}/out/checkpoint-12/manifest.json" in copied
    os.rename(out, tmp_path / "lost")
    code, screen = end(start(command))
    assert code == 0, screen
    assert f"resuming from {out}/checkpoint-12" in (out / "train.log").read_text()
    assert damage(out / "checkpoint-12") is None
    assert sha256_file(out / "adapter_model.safetensors") == weights
