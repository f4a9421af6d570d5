"""What a launcher costs once the training runs: accelerate with one process, and Ray with one worker, beside none.

    python bench/overhead.py [--rounds 5] [--steps 200] [--ray PYTHON]

The three take turns, on a tiny model, so that nothing but their own cost stands out; the figure is the median over the
rounds of the time from the first step to the last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402


def seconds(command: list[str], model: Path, data: Path, folder: Path, steps: int) -> float:
    out = folder / "out"
    options = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": out, "ref_cache": folder / "cache",
        "bf16": "false", "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "no", "use_cpu": "true",
        "resume_from_checkpoint": "no",
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run([*command, str(ROOT / "scripts" / "dpo.py"), *flags], check=True, capture_output=True)
    return float(json.loads((out / "training_metrics.json").read_text())["train"]["train_runtime"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ray", default=None, help="a Python that has Ray; without it Ray is left out")
    given = parser.parse_args()
    commands = {
        "none": [sys.executable],
        "accelerate": [
            sys.executable, "-m", "tandem.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"),
        ],
    }  # fmt: skip
    if given.ray:
        commands["ray"] = [given.ray, str(ROOT / "scripts" / "ray_launch.py"), "--num_workers", "1"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = tiny.save_model(folder / "model"), folder / "data"
        data.mkdir()
        tiny.save_pairs(data / "train.jsonl", tiny.hh_rows(256))
        for _ in range(given.rounds):
            for launcher, command in commands.items():
                times[launcher].append(seconds(command, model, data, folder, given.steps))
    alone = statistics.median(times["none"])
    for launcher, values in times.items():
        middle = statistics.median(values)
        shown = ", ".join(f"{value:.2f}" for value in sorted(values))
        print(f"{launcher}: {middle:.3f} s ({middle / alone - 1:+.1%}) of {shown}")


if __name__ == "__main__":
    main()
