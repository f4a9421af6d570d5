"""Tandem beside stock TRL: the same model, pairs, order and seed, each in a process of its own, interleaved.

    make bench                                                # over an hour on two cores
    python bench/run.py --settings full_hh_8 --repeats 3
    python bench/run.py --device cuda                         # random-weight Llamas of 1B and 8B in bfloat16
    python bench/run.py --device cuda --short                 # the main ratios alone, in about five minutes
    python bench/run.py --short                               # the same with a tiny model: whether the mode runs

Prints ratios of medians as a Markdown table, and beside each the ratio that arithmetic alone allows.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.data.sample import sample_path

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
HH = SHARED / "hh_harmless_base_test_part1.jsonl.gz"
SHAREGPT = SHARED / "sharegpt_dpo_en_demo.json.gz"

# What each side adds to the worker's command line
SIDES = {
    "trl": "--side trl",
    "trl_precompute": "--side trl_precompute",
    "packed": "--side packed",
    "cold": "--side shared",
    "warm": "--side shared --warm",
}


@dataclass(frozen=True)
class Setting:
    """Runs on the same pairs, one of each side in turn, and the comparisons (base, ours) made of them."""

    flags: str
    comparisons: tuple[tuple[str, str], ...] = (("trl", "cold"),)
    data: Path = HH
    pairs: int = 24

    @property
    def sides(self) -> list[str]:
        return list(dict.fromkeys(side for comparison in self.comparisons for side in comparison))


CPU = {
    "full_hh_8": Setting("--batch 8", (("trl", "cold"), ("trl", "warm"), ("trl_precompute", "cold"))),
    "lora_hh_8": Setting("--batch 8 --lora", (("trl", "cold"), ("trl", "warm"))),
    # More pairs, since the first 24 make batches of four that are padded less than HH's are on average
    "full_hh_4": Setting("--batch 4", pairs=48),
    "full_sharegpt_4": Setting("--batch 4", data=SHAREGPT, pairs=16),
    "bf16_full_hh_8": Setting("--batch 8 --bf16"),
    # More steps, so that the rate is of those that come after the memory was first touched
    "packed_full_hh_8": Setting("--batch 8", (("packed", "cold"),), pairs=80),
}
CUDA = {
    f"{size}_{name}": Setting(f"--device cuda --random {size} --bf16 --max_length 1024 {flags}", pairs=pairs)
    for size, pairs in (("1B", 256), ("8B", 64))
    for name, flags in (("plain", "--batch 8"), ("checkpointing", "--batch 8 --checkpointing"))
}
# Once each, all weights of 1B and LoRA at 8B, beside TRL at its best
SHORT = {
    "1B_short": Setting(
        "--device cuda --random 1B --bf16 --max_length 1024 --batch 8 --checkpointing",
        (("trl_precompute", "cold"),),
        pairs=64,
    ),
    "8B_lora_short": Setting(
        "--device cuda --random 8B --bf16 --max_length 1024 --batch 8 --checkpointing --lora",
        (("trl_precompute", "cold"),),
        pairs=64,
    ),
}
# On the CPU, as a rehearsal whose figures mean nothing
TINY = {
    name: replace(setting, flags=re.sub(r"--device cuda --random \w+", "--random tiny", setting.flags), pairs=16)
    for name, setting in SHORT.items()
}
COLUMNS = (
    "setting|base pairs/s|Tandem pairs/s|ratio|FLOPs allow|CPU s|peak memory|of matmul rate (base)|monitor|loss diff"
)


def measure(setting: Setting, side: str, model: str, given: Path | None) -> dict[str, Any]:
    data = next((file for file in (given, setting.data) if file and file.exists()), sample_path("train"))
    flags = f"{SIDES[side]} {setting.flags} --pairs {setting.pairs}"
    command = [sys.executable, str(HERE / "worker.py"), *shlex.split(flags), "--model", model, "--data", str(data)]
    # On the machine's own terms: no test runner's or launcher's thread count
    foreign = {"OMP_NUM_THREADS"}
    if side.startswith("trl"):
        foreign |= {"THP_MEM_ALLOC_ENABLE"}  # set by importing tandem, which a user of TRL alone does not
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def row(name: str, base: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    loss = max(abs(a - b) for a, b in zip(base[0]["losses"], ours[0]["losses"], strict=True))
    # The base may itself be one of our layouts
    allowed = ours[0]["flops_allow"] / base[0]["flops_allow"]
    memory = median(base, "peak_gb"), median(ours, "peak_gb")
    cells = [
        name,
        f"{median(base, 'pairs_per_s'):.3f}",
        f"{median(ours, 'pairs_per_s'):.3f}",
        f"**{median(ours, 'pairs_per_s') / median(base, 'pairs_per_s'):.2f}**",
        f"{allowed:.2f}",
        f"{median(base, 'cpu_s') / median(ours, 'cpu_s'):.2f}",
        f"{memory[0]:.1f} → {memory[1]:.1f} GB ({memory[1] / memory[0]:.2f})",
        f"{median(ours, 'of_matmul'):.0%} ({median(base, 'of_matmul'):.0%})",
        f"{median(ours, 'monitor_share'):.2%}",
        f"{loss:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def default_settings() -> list[str]:
    """All of the CPU's, but bfloat16 only where it has products of them: elsewhere a step takes minutes."""
    from tandem.devices import fast_bf16  # after the options: importing torch takes seconds

    left_out = [] if fast_bf16() else [name for name, setting in CPU.items() if "--bf16" in setting.flags]
    for name in left_out:
        print(f"{name} is left out: this CPU has no bfloat16 products; --settings {name} runs it all the same\n")
    return [name for name in CPU if name not in left_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    names = f"cpu: {', '.join(CPU)}; cuda: {', '.join(CUDA)}"
    parser.add_argument("--settings", nargs="+", choices=[*CPU, *CUDA, *SHORT], metavar="NAME", help=names)
    parser.add_argument("--short", action="store_true", help="the main ratios, once each; on the CPU a rehearsal")
    parser.add_argument("--repeats", type=int, help="runs of each side; unset: 2, with --short 1")
    parser.add_argument("--model", default=None, help="model folder; unset: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="file of pairs for every setting; unset: each has its own")
    parser.add_argument("--raw", type=Path, help="file for one JSON line a run")
    options = parser.parse_args()
    if options.short and options.settings:
        parser.error("--short has settings of its own")
    short = SHORT if options.device == "cuda" else TINY
    settings = CUDA | SHORT if options.device == "cuda" else CPU | (TINY if options.short else {})
    if options.data and not options.data.exists():
        parser.error(f"--data {options.data}: no such file")
    unknown = set(options.settings or ()) - set(settings)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not a setting of --device {options.device}")
    model = options.model
    if model is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "SmolLM2-135M-Instruct"
        subprocess.run([sys.executable, "-m", "tandem.demo", str(folder)], check=True)
        model = str(folder)
    chosen = options.settings or list(short if options.short else CUDA if options.device == "cuda" else ())
    chosen = chosen or default_settings()
    for file in {settings[name].data for name in chosen if not (options.data or settings[name].data).exists()}:
        print(f"{file} is not here: the sample set, whose pairs are shorter, stands in for it\n")
    print(f"|{COLUMNS}|\n" + "|---" * (COLUMNS.count("|") + 1) + "|", flush=True)
    for name in chosen:
        setting = settings[name]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in setting.sides}
        for _ in range(options.repeats or (1 if options.short else 2)):
            for side in setting.sides:
                runs[side].append(measure(setting, side, model, options.data))
                if options.raw:
                    with options.raw.open("a") as file:
                        file.write(json.dumps({"setting": name, "side": side} | runs[side][-1]) + "\n")
        for base, ours in setting.comparisons:
            print(row(f"{name}: {ours} to {base}", runs[base], runs[ours]), flush=True)


if __name__ == "__main__":
    main()
