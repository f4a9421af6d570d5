"""Stand-ins for `srun` and `scontrol`: nodes that are processes on this machine."""

import sys
from pathlib import Path

SRUN = """#!{python}
import os, signal, subprocess, sys, time

command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
nodes = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}}, start_new_session=True)
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
with open(os.environ["NODES_FILE"], "w") as file:
    file.write(" ".join(str(node.pid) for node in nodes))
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
while True:
    codes = [node.poll() for node in nodes]
    failed = [code if code > 0 else 128 - code for code in codes if code]
    if None not in codes:
        sys.exit(max(failed, default=0))
    if set(failed) - {{75}}:  # --kill-on-bad-exit
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
        sys.exit(max(failed))
    time.sleep(0.01)
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo 127.0.0.1; done ;;
  *) echo "$@" >>"$REQUEUE_FILE" ;;
esac
"""


def install(folder: Path, nodes: int, job: int, submitted_from: Path) -> dict[str, str]:
    """Put the stand-ins into `folder`; the environment of a job that uses them. PATH is to be put in front."""
    folder.mkdir(exist_ok=True)
    for name, content in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return {
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[0-{nodes - 1}]",
        "SLURM_JOB_ID": str(job),
        "SLURM_SUBMIT_DIR": str(submitted_from),
        "NODES_FILE": str(folder / "nodes"),
        "REQUEUE_FILE": str(folder / "requeued"),
    }
