"""`dpo.py --plan` beside the peak memory of the run that it plans, each in a process of its own, on the CPU.

    python bench/plan.py                    # about 8 minutes on two cores
    python bench/plan.py --kinds lora --batches 8

Prints a Markdown table: resident memory at its peak, planned and measured, and the error of the plan.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HH = HERE.parent.parent / "shared" / "data" / "hh_harmless_base_test_part1.jsonl.gz"
PAIRS = 24


def command(kind: str, batch: int, model: str, folder: str) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": HH,
        "max_bad_rows": 1000,
        "max_train_samples": PAIRS,
        "max_length": 512,
        "per_device_train_batch_size": batch,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "use_peft": str(kind == "lora").lower(),
        "save_strategy": "no",
        "output_dir": f"{folder}/run",
        "ref_cache": f"{folder}/cache",
    }
    return [sys.executable, str(HERE.parent / "scripts" / "dpo.py")] + [f"--{k}={v}" for k, v in flags.items()]


def planned(argv: list[str]) -> float:
    """GiB."""
    text = subprocess.run([*argv, "--plan"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"^peak memory per device .*: ([0-9.]+) GiB$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def measured(argv: list[str]) -> float:
    """GiB of the run's greatest resident memory, as the kernel counts it for this one process."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(argv)}")
    return usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["full", "lora"], choices=("full", "lora"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--model", default=None, help="model folder; unset: the demo's SmolLM2-135M-Instruct")
    options = parser.parse_args()
    model = options.model
    if model is None:
        model = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "SmolLM2-135M-Instruct")
        subprocess.run([sys.executable, "-m", "tandem.demo", model], check=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| run | planned GiB | measured GiB | planned / measured |\n|---|---|---|---|")
    for kind in options.kinds:
        for batch in options.batches:
            with tempfile.TemporaryDirectory() as folder:
                argv = command(kind, batch, model, folder)
                plan, peak = planned(argv), measured(argv)
            print(f"| {kind}, batch {batch} | {plan:.2f} | {peak:.2f} | {plan / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
