"""A template that tells the date: a run that is killed and goes on another day is the run that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.runs import is_complete, sha256_file
from tests import tiny
from tests.data.test_templates import SHIPPED

ROOT = Path(__file__).parents[2]
LATER = 400  # days

# A script on another day: those who ask for the date are told that of `sys.argv[1]` days later. Not all of the process:
# pandas and pyarrow hold the type `datetime` itself
CLOCK = """
import datetime, importlib.abc, importlib.util, runpy, sys
days = datetime.timedelta(days=int(sys.argv.pop(1)))
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + days
class Clock(importlib.abc.MetaPathFinder):
    asks = {"transformers.utils.chat_template_utils", "tandem.training.settings"}
    def find_spec(self, name, path=None, target=None):
        if name not in self.asks:
            return None
        self.asks.remove(name)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            assert module.datetime is datetime.datetime
            module.datetime = Shifted
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Clock())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(day: int, script: str, **options: Any) -> list[str]:
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-c", CLOCK, str(day), str(ROOT / "scripts" / f"{script}.py"), *given]


def start(day: int, script: str, **options: Any) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        command(day, script, **options), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def run(day: int, script: str, **options: Any) -> str:
    process = start(day, script, **options)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llama3_2", "gptoss"])
def test_killed_today_and_resumed_another_day(template: str, tmp_path: Path, tiny_data: Path):
    model = tiny.save_model(tmp_path / "model", chat_template=SHIPPED[template])
    settings: dict[str, Any] = {
        "model_name_or_path": model, "dataset_name": tiny_data, "bf16": "false", "gradient_checkpointing": "false",
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 24, "save_steps": 4,
        "save_total_limit": 10, "ref_cache": tmp_path / "cache",
    }  # fmt: skip
    whole, killed, fresh = (tmp_path / name for name in ("whole", "killed", "fresh"))
    run(0, "dpo", output_dir=whole, **settings)

    process = start(0, "dpo", output_dir=killed, **settings)
    while not (killed / "checkpoint-8").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_complete(killed)
    said = run(LATER, "dpo", output_dir=killed, **settings)
    assert "resuming from" in said and "reference of train pairs: 32 of 32" in said

    run(LATER, "dpo", output_dir=fresh, **settings)
    content = {folder.name: sha256_file(folder / "model.safetensors") for folder in (whole, killed, fresh)}
    assert content["killed"] == content["whole"] != content["fresh"]
    days = [json.loads((folder / "run.json").read_text())["day"] for folder in (whole, killed, fresh)]
    assert days[0] == days[1] < days[2]

    # What is asked afterwards is what was trained, whenever it is asked
    results = []
    for day in (0, LATER):
        file = tmp_path / f"results{day}.json"
        run(day, "evaluate", reference_model=model, dpo_model=killed, dataset_name=tiny_data, output_file=file)
        results.append(json.loads(file.read_text())["models"])
    assert results[0] == results[1]
