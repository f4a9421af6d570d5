"""`--plan` of dpo.py and sft.py beside the run that it plans, each in a process of its own, on the CPU.

    python bench/plan.py                    # about 20 minutes on one core
    python bench/plan.py --runs full_8 lora_8

Prints a Markdown table: resident memory at its peak and seconds of training, planned and measured. Beside the planned
memory stands what it is without the part for the allocator.
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
PAIRS = 16
HEAD = "| run | planned GiB | without allocator | measured GiB | planned / measured | planned s | measured s |"

# What each run adds to the command line below
RUNS = {
    "full_1": "--per_device_train_batch_size 1",
    "full_4": "--per_device_train_batch_size 4",
    "full_8": "--per_device_train_batch_size 8",
    "lora_1": "--per_device_train_batch_size 1 --use_peft true",
    "lora_4": "--per_device_train_batch_size 4 --use_peft true",
    "lora_8": "--per_device_train_batch_size 8 --use_peft true",
    "full_8_checkpointing": "--per_device_train_batch_size 8 --gradient_checkpointing true",
    "lora_8_checkpointing": "--per_device_train_batch_size 8 --use_peft true --gradient_checkpointing true",
    "full_2_padded": "--per_device_train_batch_size 2 --layout padded",
    "full_8_packed": "--per_device_train_batch_size 8 --layout packed",
    "sft_4": "--per_device_train_batch_size 4",
}


def command(name: str, model: str, folder: str) -> list[str]:
    script = "sft.py" if name.startswith("sft") else "dpo.py"
    flags = {
        "model_name_or_path": model,
        "dataset_name": HH,
        "max_bad_rows": 1000,
        "max_train_samples": PAIRS,
        "max_length": 512,
        "bf16": "false",
        "save_strategy": "no",
        "output_dir": f"{folder}/run",
    }
    if script == "dpo.py":
        flags["ref_cache"] = f"{folder}/cache"
    common = [f"--{flag}={value}" for flag, value in flags.items()]
    unless_asked = [f"--{flag}=false" for flag in ("use_peft", "gradient_checkpointing") if flag not in RUNS[name]]
    return [sys.executable, str(HERE.parent / "scripts" / script), *common, *unless_asked, *RUNS[name].split()]


def planned(argv: list[str]) -> tuple[float, float, float]:
    """Peak memory in GiB, how much of it is the allocator's, and seconds of training."""
    text = subprocess.run([*argv, "--plan"], capture_output=True, text=True, check=True).stdout
    figures = (r"^peak memory per device .*: ([0-9.]+) GiB$", r"^  allocator: ([0-9.]+) GiB$", r"^time: (\d+) s of")
    memory, allocator, seconds = (float(re.findall(figure, text, re.MULTILINE)[0]) for figure in figures)
    return memory, allocator, seconds


def measured(argv: list[str]) -> tuple[float, float]:
    """The run's greatest resident memory in GiB, as the kernel counts it for this one process, and its seconds."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read()
    if status:
        sys.exit(f"failed: {' '.join(argv)}\n{text}")
    return usage.ru_maxrss / 2**20, float(re.findall(r"train_runtime\W+([0-9.]+)", text)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--model", default=None, help="model folder; unset: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--table", type=Path, default=None, help="file for the table, beside the console")
    options = parser.parse_args()
    model = options.model
    if model is None:
        model = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tandem" / "SmolLM2-135M-Instruct")
        subprocess.run([sys.executable, "-m", "tandem.demo", model], check=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    print(*table, sep="\n")
    for name in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            argv = command(name, model, folder)
            (plan, allocator, promised), (peak, seconds) = planned(argv), measured(argv)
        memory = f"{plan:.2f} | {plan - allocator:.2f} | {peak:.2f} | {plan / peak:.2f}"
        table.append(f"| {name} | {memory} | {promised:.0f} | {seconds:.0f} |")
        print(table[-1], flush=True)
    if options.table is not None:
        options.table.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
