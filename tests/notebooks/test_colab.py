"""The Colab notebook, cell by cell on a CPU with a tiny model: taken away in the middle of DPO, then run again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from tandem.runs import MANIFEST
from tests import tiny
from tests.pipelines.test_pipeline import write_recipe

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "tandem_colab.ipynb"
RUN_ALL = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_the_notebook_goes_on_where_a_lost_machine_was(tmp_path: Path, tiny_model: Path):
    data, run, keep = tmp_path / "data", tmp_path / "run", tmp_path / "keep"
    data.mkdir()
    tiny.save_pairs(data / "train.jsonl", tiny.hh_rows(30))
    tiny.save_pairs(data / "test.jsonl", tiny.hh_rows(10, start=30))
    recipe = write_recipe(tmp_path / "recipe", dpo={"ref_cache": str(tmp_path / "reference")})
    environment = os.environ | {
        "TANDEM_REPOSITORY": str(ROOT),
        "TANDEM_KEEP": str(keep),
        "MODEL_NAME": str(tiny_model),
        "DATASET": str(data),
        "OUTPUT_DIR": str(run),
        "RECIPE": str(recipe),
    }
    executed = tmp_path / "executed.ipynb"
    command = [sys.executable, "-c", RUN_ALL, str(NOTEBOOK), str(executed)]
    checkpoint = keep / "colab" / "dpo" / "checkpoint-8" / MANIFEST

    machine = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    while not checkpoint.exists():
        assert machine.poll() is None, printed(executed)
        time.sleep(0.01)
    os.killpg(machine.pid, signal.SIGKILL)
    machine.wait()
    # The kernel is in a session of its own; its machine goes as a whole
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)
    shutil.rmtree(run)

    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    screen = printed(executed)
    assert f"going on from {keep / 'colab'}" in screen
    assert f"resuming from {run / 'dpo'}/checkpoint-" in screen
    assert (run / "results.md").read_text() in screen
    assert (keep / "colab" / "report.html").read_bytes() == (run / "report.html").read_bytes()
