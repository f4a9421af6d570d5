"""The Slurm template under a stand-in for srun: what each node runs, how a preemption ends, a node that is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tandem.monitor.margins import read_margins_log
from tandem.runs import read_jsonl, sha256_file
from tests.distributed import fake_slurm
from tests.distributed.ranks import ENVIRONMENT, ROOT, flags, script, start, torchrun

TEMPLATE = ROOT / "pipelines" / "cluster" / "slurm.sbatch"


def submit(tmp_path: Path, *argv: str, code: int = 0, **environment: str) -> tuple[int, list[list[str]], str]:
    """The template on two nodes, with a python that only notes its arguments; exit code, arguments, what it said."""
    notes = tmp_path / "notes"
    slurm = fake_slurm.install(tmp_path / "bin", nodes=2, job=54321, submitted_from=tmp_path)
    fake = tmp_path / "bin" / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(notes)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\nsys.exit({code})\n"
    )
    fake.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(TEMPLATE), *argv], env=os.environ | slurm | path | environment, capture_output=True, text=True
    )
    lines = notes.read_text().splitlines() if notes.exists() else []
    return done.returncode, sorted(json.loads(line) for line in lines), done.stdout + done.stderr


def test_each_node_runs_a_launcher_with_its_rank(tmp_path: Path):
    code, calls, _ = submit(tmp_path, "scripts/dpo.py", "--run_name", "two words", SLURM_GPUS_ON_NODE="4")
    begin = ["-m", "tandem.launch", "torchrun", "--nnodes", "2", "--nproc_per_node", "4", "--master_addr", "127.0.0.1"]
    begin += ["--master_port", "34321", "--node_rank"]
    assert code == 0
    assert calls == [[*begin, node, "scripts/dpo.py", "--run_name", "two words"] for node in "01"]


def test_with_an_accelerate_config(tmp_path: Path):
    code, calls, _ = submit(tmp_path, "scripts/dpo.py", ACCELERATE_CONFIG="fsdp.yaml", PROCESSES_PER_NODE="8")
    begin = ["-m", "tandem.launch", "--config_file", "fsdp.yaml", "--num_machines", "2", "--num_processes", "16"]
    begin += ["--main_process_ip", "127.0.0.1", "--main_process_port", "34321", "--machine_rank"]
    assert code == 0
    assert calls == [[*begin, node, "scripts/dpo.py"] for node in "01"]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (2, False), (3, False), (1, False)])
def test_only_a_preemption_is_requeued(tmp_path: Path, code: int, requeued: bool):
    assert submit(tmp_path, "scripts/dpo.py", code=code)[0] == code
    noted = tmp_path / "bin" / "requeued"
    assert noted.exists() == requeued
    if requeued:
        assert noted.read_text() == "requeue 54321\n"


def test_a_job_without_a_script(tmp_path: Path):
    code, calls, said = submit(tmp_path)
    assert (code, calls) == (2, [])
    assert said == "UserError: name the script to run, scripts/sft.py or scripts/dpo.py, and its options\n"


@pytest.mark.slow
def test_a_lost_node_and_a_preemption(tmp_path: Path, tiny_model: Path, tiny_data: Path):
    """Two nodes of one rank each, on loopback: one is killed, then the job is told to go, then it finishes."""

    def options(name: str) -> list[str]:
        return flags(
            model_name_or_path=tiny_model,
            dataset_name=tiny_data,
            ref_cache=tmp_path / "cache",
            output_dir=tmp_path / name,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            max_steps=24,
            save_steps=6,
        )

    straight = start(torchrun(script("dpo"), *options("straight")))
    screen, _ = straight.communicate()
    assert straight.returncode == 0, screen
    slurm = fake_slurm.install(tmp_path / "bin", nodes=2, job=54321, submitted_from=ROOT)
    path = {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tmp_path / "out" / "logs" / "margins" / "margins_log.jsonl"

    def job(until: int) -> "subprocess.Popen[str]":
        process = start([str(TEMPLATE), script("dpo"), *options("out")], **slurm, **path, **ENVIRONMENT)
        while len(read_jsonl(log)) < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        return process

    lost = job(until=8)
    node = int((tmp_path / "bin" / "nodes").read_text().split()[1])
    processes = [psutil.Process(node), *psutil.Process(node).children(recursive=True)]
    for process in processes:
        process.kill()
    screen, _ = lost.communicate(timeout=180)
    assert lost.returncode not in (0, 75), screen
    assert not (tmp_path / "bin" / "requeued").exists()

    told = job(until=14)
    for process in psutil.Process(told.pid).children():
        if "srun" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGTERM)  # what Slurm does, as --signal=TERM@120 without B: asks
    screen, _ = told.communicate(timeout=180)
    assert told.returncode == 75, screen
    assert (tmp_path / "bin" / "requeued").read_text() == "requeue 54321\n"

    screen, _ = (last := job(until=0)).communicate(timeout=180)
    assert last.returncode == 0, screen
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("straight", "out")]
    assert weights[0] == weights[1]
    margins = [read_margins_log(tmp_path / name / "logs" / "margins") for name in ("straight", "out")]
    assert margins[0] == margins[1]
