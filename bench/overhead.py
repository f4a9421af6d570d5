"""What a launcher costs once the training runs: accelerate with one process, and Ray with one worker, beside none.

    python bench/overhead.py [--rounds 6] [--steps 80] [--hidden 192] [--ray PYTHON]

The launchers take turns, each round in another order, on a model whose steps are shorter than any real one's, so that
their own cost stands out.
Measured from the end of a run's tenth step to the end of its last: wall-clock seconds, the median step, and CPU seconds
of the training process. A launcher's figure is the median over the rounds of its ratio to no launcher in the same
round.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402

SCRIPT = ROOT / "bench" / "clocked" / "dpo.py"
FIRST = 10  # steps before, in which memory and caches fill
# One thread each, as Ray gives its workers: a second one would be the launcher's, not the training's
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_HUB_OFFLINE": "1"}


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


def measured(command: list[str], model: Path, data: Path, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of one run after its first steps."""
    out = folder / "out"
    options = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": out, "ref_cache": folder / "cache",
        "bf16": "false", "per_device_train_batch_size": 8, "max_steps": steps, "save_strategy": "no", "use_cpu": "true",
        "resume_from_checkpoint": "no", "logging_steps": 10,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*command, str(SCRIPT), *flags], capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    wall, cpu = zip(*json.loads((out / "clock.json").read_text())[FIRST - 1 :], strict=True)
    (out / "clock.json").unlink()
    step = statistics.median(after - before for before, after in itertools.pairwise(wall))
    return {"wall": wall[-1] - wall[0], "median step": step, "CPU": cpu[-1] - cpu[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=192, help="width of the model, of 4 layers")
    parser.add_argument("--ray", default=None, help="a Python that has Ray; without it Ray is left out")
    given = parser.parse_args()
    if given.steps <= FIRST + 1:
        parser.error(f"--steps must be above {FIRST + 1}")
    commands = {
        "none": [sys.executable],
        "accelerate": [
            sys.executable, "-m", "tandem.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"),
        ],
    }  # fmt: skip
    if given.ray:
        commands["ray"] = [given.ray, str(ROOT / "scripts" / "ray_launch.py"), "--num_workers", "1"]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = save_model(folder / "model", given.hidden), folder / "data"
        data.mkdir()
        tiny.save_pairs(data / "train.jsonl", tiny.hh_rows(256))
        for number in range(given.rounds):
            turns = list(commands)[number % len(commands) :] + list(commands)[: number % len(commands)]
            rounds.append({who: measured(commands[who], model, data, folder, given.steps) for who in turns})
            shown = {who: {what: round(value, 4) for what, value in rounds[-1][who].items()} for who in commands}
            print(f"round {number + 1}: {json.dumps(shown)}", flush=True)
    alone = statistics.median(each["none"]["median step"] for each in rounds)
    print(f"\nMedian of {given.rounds} rounds, steps of {1000 * alone:.0f} ms without a launcher;")
    print("in brackets the least and the greatest:\n")
    print("| launcher | wall | median step | CPU seconds |\n|---|---|---|---|")
    for who in commands:
        if who != "none":
            print(f"| {who} | {' | '.join(_cell(rounds, who, what) for what in ('wall', 'median step', 'CPU'))} |")


def _cell(rounds: list[dict[str, dict[str, float]]], who: str, what: str) -> str:
    more = sorted(each[who][what] / each["none"][what] - 1 for each in rounds)
    return f"{statistics.median(more):+.1%} ({more[0]:+.1%} to {more[-1]:+.1%})"


if __name__ == "__main__":
    main()
