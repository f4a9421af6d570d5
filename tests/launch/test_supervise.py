"""SIGTERM to a pipeline: it reaches the program of its stage, whose work is waited for, and the exit code is 75."""

import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAVER = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


def terminated(folder: Path, stage: str) -> tuple[int, str]:
    """Exit code and screen of a pipeline whose shell alone was sent SIGTERM in its first stage."""
    (folder / "saver.py").write_text(SAVER)
    road = folder / "road.sh"
    road.write_text(
        f'#!/usr/bin/env bash\nsource "{ROOT}/pipelines/lib.sh"\nRUN={folder}/run\nlog_to "$RUN/log"\n'
        f'stage one a {stage}\nstage two b touch "$RUN/b"\n'
    )
    road.chmod(0o755)
    process = subprocess.Popen([road], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (folder / "ready").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    screen, _ = process.communicate(timeout=30)
    return process.returncode, screen


def test_what_a_stage_saves_on_sigterm_is_waited_for(tmp_path: Path):
    code, screen = terminated(tmp_path, f"python {tmp_path}/saver.py {tmp_path}")
    assert code == 75
    assert (tmp_path / "saved").exists()
    assert screen.splitlines()[-1].startswith("== one was preempted (exit code 75).")
    assert screen in (tmp_path / "run" / "log").read_text()
    assert not (tmp_path / "run" / "b").exists()


def test_a_stage_that_does_not_listen_is_preempted_all_the_same(tmp_path: Path):
    code, screen = terminated(tmp_path, f"bash -c 'touch {tmp_path}/ready; exec sleep 60'")
    assert code == 75
    assert "== one was preempted (exit code 75)." in screen
