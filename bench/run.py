"""Tandem beside stock TRL: the same model, pairs, order and seed, each in a process of its own, interleaved.

    make bench                                            # about 30 minutes
    python bench/run.py --settings full_hh_8 --repeats 3

Prints ratios of medians as a Markdown table, and beside each the ratio that arithmetic alone allows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
HH = SHARED / "hh_harmless_base_test_part1.jsonl.gz"
SHAREGPT = SHARED / "sharegpt_dpo_en_demo.json.gz"


@dataclass(frozen=True)
class Setting:
    """One comparison: `sides` are run in turn, and the ratio is the last one's to the first one's."""

    flags: str
    sides: tuple[str, str] = ("trl", "shared")
    data: Path = HH
    pairs: int = 24
    warm: bool = False


SETTINGS = {
    "full_hh_8_cold": Setting("--batch 8"),
    "full_hh_8_warm": Setting("--batch 8", warm=True),
    "lora_hh_8_cold": Setting("--batch 8 --lora"),
    "lora_hh_8_warm": Setting("--batch 8 --lora", warm=True),
    "full_hh_4_cold": Setting("--batch 4"),
    "full_sharegpt_4_cold": Setting("--batch 4", data=SHAREGPT, pairs=16),
    "bf16_full_hh_8_cold": Setting("--batch 8 --bf16"),
    "full_hh_8_cold_trl_precompute": Setting("--batch 8", sides=("trl_precompute", "shared")),
    "packed_shared_hh_8": Setting("--batch 8", sides=("packed", "shared")),
}


def measure(setting: Setting, side: str, model: str) -> dict[str, Any]:
    from tandem.data.sample import sample_path

    data = setting.data if setting.data.exists() else sample_path("train")
    # Stock TRL computes the reference in every step: warm is a thing of ours, or of its precomputation
    warm = ["--warm"] if setting.warm and side != "trl" else []
    command = [sys.executable, str(HERE / "worker.py"), "--side", side, "--model", model, "--data", str(data)]
    command += ["--pairs", str(setting.pairs), *setting.flags.split(), *warm]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def row(name: str, base: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    loss = max(abs(a - b) for a, b in zip(base[0]["losses"], ours[0]["losses"], strict=True))
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
        f"{median(ours, 'flop_rate') / median(ours, 'matmul_rate'):.0%}",
        f"{loss:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default=None, help="model folder; unset: the demo's SmolLM2-135M-Instruct")
    options = parser.parse_args()
    model = options.model
    if model is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "SmolLM2-135M-Instruct"
        subprocess.run([sys.executable, "-m", "tandem.demo", str(folder)], check=True)
        model = str(folder)
    columns = "setting|base pairs/s|Tandem pairs/s|ratio|FLOPs allow|CPU s|peak memory|of matmul rate|loss diff"
    print(f"|{columns}|\n" + "|---" * (columns.count("|") + 1) + "|")
    for name in options.settings:
        setting = SETTINGS[name]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in setting.sides}
        for _ in range(options.repeats):
            for side in setting.sides:
                runs[side].append(measure(setting, side, model))
        print(row(name, *runs.values()), flush=True)


if __name__ == "__main__":
    main()
