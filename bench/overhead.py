"""What a launcher costs once the training runs: accelerate with one process, and Ray with one worker, beside none.

    python bench/overhead.py [--rounds 2] [--steps 200] [--hidden 192] [--ray PYTHON]

Each launched run has a run without a launcher beside it, and the two take turns of five steps on the last core, so that
both meet the same moments of a noisy machine. Everything else, a launcher's other processes included, has the first
core. The steps are shorter than those of any real model, so that the launcher's own cost stands out.
Measured after the tenth step: wall-clock seconds and CPU seconds of the training process. A launcher's figure is the
median over the turns of its ratio to the turn beside it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.clocked.dpo import FIRST, TURN  # noqa: E402
from tests import tiny  # noqa: E402

SCRIPT = ROOT / "bench" / "clocked" / "dpo.py"
FIRST_CORE, *_, LAST_CORE = sorted(os.sched_getaffinity(0))
# One thread each, as Ray gives its workers
ENVIRONMENT = os.environ | {
    "TURNS_CORE": str(LAST_CORE),
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    "HF_HUB_OFFLINE": "1",
}


def save_model(folder: Path, hidden: int) -> Path:
    """A random Llama of 4 layers with the tests' tokenizer."""
    text = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(text),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def start(command: list[str], model: Path, data: Path, output: Path, steps: int) -> subprocess.Popen[bytes]:
    options = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": output, "ref_cache": output / "cache",
        "bf16": "false", "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "no", "use_cpu": "true",
        "resume_from_checkpoint": "no", "logging_steps": 10,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    argv = ["taskset", "-c", str(FIRST_CORE), *command, str(SCRIPT), *flags]
    with output.with_suffix(".log").open("w") as log:
        return subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)


def take_turns(command: list[str], model: Path, data: Path, folder: Path, steps: int) -> list[dict[str, float]]:
    """One launched run beside a plain one: of each turn its seconds, and their ratio to those of the turn beside it."""
    folder.mkdir()
    sides = {"launched": command, "plain": [sys.executable]}
    runs = {side: start(sides[side], model, data, folder / side, steps) for side in sides}
    while None in (codes := [run.poll() for run in runs.values()]) and not any(codes):
        if all((folder / side / "ready").exists() for side in sides) and not (folder / "begun").exists():
            (folder / "plain" / "turn").touch()
            (folder / "begun").touch()
        time.sleep(0.1)
    for side, run in runs.items():
        run.kill()  # it waits for the other, if that failed
        if run.returncode:
            sys.exit(f"{side}: {(folder / f'{side}.log').read_text()[-3000:]}")
    clocks = [json.loads((folder / side / "clock.json").read_text()) for side in sides]
    shutil.rmtree(folder)
    return [
        {"wall": wall / plain_wall, "CPU": cpu / plain_cpu, "step": plain_wall / TURN}
        for (wall, cpu), (plain_wall, plain_cpu) in zip(*clocks, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=192, help="width of the model, of 4 layers")
    parser.add_argument("--ray", default=None, help="a Python that has Ray; without it Ray is left out")
    given = parser.parse_args()
    if given.steps < FIRST + 2 * TURN or (given.steps - FIRST) % TURN:
        parser.error(f"--steps must be {FIRST} and two or more turns of {TURN}")
    commands = {
        "accelerate": [
            sys.executable, "-m", "tandem.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"),
        ],
    }  # fmt: skip
    if given.ray:
        commands["ray"] = [given.ray, str(ROOT / "scripts" / "ray_launch.py"), "--num_workers", "1"]
    turns: dict[str, list[dict[str, float]]] = {who: [] for who in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = save_model(folder / "model", given.hidden), folder / "data"
        data.mkdir()
        tiny.save_pairs(data / "train.jsonl", tiny.hh_rows(256))
        for _ in range(given.rounds):
            for who, command in commands.items():
                turns[who] += take_turns(command, model, data, folder / "runs", given.steps)
    steps = [turn["step"] for each in turns.values() for turn in each]
    print(f"Steps of {1000 * statistics.median(steps):.0f} ms without a launcher; medians over turns of {TURN} steps,")
    print("in brackets their quartiles:\n")
    print("| launcher | turns | wall | CPU seconds |\n|---|---|---|---|")
    for who, each in turns.items():
        print(f"| {who} | {len(each)} | {_cell(each, 'wall')} | {_cell(each, 'CPU')} |")


def _cell(turns: list[dict[str, float]], what: str) -> str:
    lower, middle, upper = statistics.quantiles([turn[what] - 1 for turn in turns], n=4)
    return f"{middle:+.1%} ({lower:+.1%} to {upper:+.1%})"


if __name__ == "__main__":
    main()
