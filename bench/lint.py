"""The data check on many pairs: seconds, and the memory of all its processes.

    python bench/lint.py                     # 160,000 pairs of the size of HH's
    python bench/lint.py --pairs 10000

The pairs are the HH file's, over and over, with half of the words replaced by others of the file at random, so that no
two are near duplicates. Prints a row for RESULTS.md.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tandem.data.formats import Message, to_transcript
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.held import held  # noqa: E402

HH = ROOT.parent / "shared" / "data" / "hh_harmless_base_test_part1.jsonl.gz"
_WORD = re.compile(r"\w+")


def write_pairs(path: Path, count: int, data: Path, seed: int = 0) -> None:
    pairs = load_pairs(DataOptions(str(data), max_bad_rows=100), "train")
    noise = random.Random(seed)
    words = [word for pair in pairs for turn in pair["prompt"] for word in _WORD.findall(turn["content"])]

    def other(match: re.Match[str]) -> str:
        return noise.choice(words) if noise.random() < 0.5 else match.group()

    def changed(turns: list[Message]) -> list[Message]:
        return [turn | {"content": _WORD.sub(other, turn["content"])} for turn in turns]

    with path.open("w") as file:
        for number in range(count):
            pair = pairs[number % len(pairs)]
            prompt = changed(pair["prompt"])
            row = {side: to_transcript(prompt + changed(pair[side])) for side in ("chosen", "rejected")}
            file.write(json.dumps(row) + "\n")


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds, and the most memory held at once by a command and its children (PSS: shared pages counted once)."""
    start, most = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=ROOT, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    while process.poll() is None:
        most = max(most, held(process))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--tokenizer", default=str(Path("~/.cache/tandem/SmolLM2-135M-Instruct").expanduser()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder) / "pairs.jsonl", Path(folder) / "data_report.json"
        write_pairs(file, arguments.pairs, arguments.data)
        command = [sys.executable, "scripts/check_data.py", "--dataset_name", str(file), "--val_ratio", "0.05"]
        command += ["--tokenizer_name_or_path", arguments.tokenizer, "--max_bad_rows", "1000", "--report", str(report)]
        seconds, memory = measure(command)
        size = file.stat().st_size
    cores = len(os.sched_getaffinity(0))
    print("| pairs | file | cores | seconds | pairs/s | peak memory |", "|---|---|---|---|---|---|", sep="\n")
    print(
        f"| {arguments.pairs:,} | {size / 1e6:.0f} MB | {cores} | {seconds:.0f} | {arguments.pairs / seconds:,.0f} "
        f"| {memory / 2**30:.2f} GiB |"
    )


if __name__ == "__main__":
    main()
