"""What threads that wait by spinning cost: decoding and training, alone and beside one busy process.

    python bench/spin.py [--rounds 2] [--model FOLDER]

Each setting runs in a process of its own, all in turns: libgomp reads its environment once, when torch loads it.
Prints the least wall and CPU seconds of the rounds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = (
    {},
    {"OMP_WAIT_POLICY": "PASSIVE"},
    {"GOMP_SPINCOUNT": "1000"},
    {"GOMP_SPINCOUNT": "10000"},
    {"GOMP_SPINCOUNT": "100000"},
)
MODEL = Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"
FOREIGN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}


def work(folder: str) -> dict[str, list[float]]:
    """Wall and CPU seconds of 12 tokens of 8 prompts of 40, and of one step over 4 rows of 120 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, rows = torch.randint(5, 40_000, (8, 40)), torch.randint(5, 40_000, (4, 120))

    def decode() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )

    def train() -> None:
        model.zero_grad()
        model(rows, labels=rows).loss.backward()

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    found = {}
    for part in (decode, train):
        part()
        timings = []
        for _ in range(2):
            wall, used = time.perf_counter(), cpu()
            part()
            timings.append((time.perf_counter() - wall, cpu() - used))
        found[part.__name__] = [min(each) for each in zip(*timings, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work(given.model)))
        return
    plain = {name: value for name, value in os.environ.items() if name not in FOREIGN} | {"HF_HUB_OFFLINE": "1"}
    found: dict[tuple[str, str, str], list[list[float]]] = {}
    for _ in range(given.rounds):
        for beside in ("alone", "beside one"):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside != "alone" else None
            for setting in SETTINGS:
                command = [sys.executable, __file__, "--work", "--model", given.model]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain | setting)
                named = " ".join(f"{name}={value}" for name, value in setting.items()) or "libgomp's own"
                for part, timing in json.loads(done.stdout.splitlines()[-1]).items():
                    found.setdefault((named, part, beside), []).append(timing)
            if busy:
                busy.kill()
                busy.wait()
    print("| waiting | decode alone: wall, CPU s | beside one | train alone | beside one |\n|---|---|---|---|---|")
    for named in dict.fromkeys(name for name, _, _ in found):
        cells = [
            "{:.2f}, {:.2f}".format(*(min(each) for each in zip(*found[named, part, beside], strict=True)))
            for part in ("decode", "train")
            for beside in ("alone", "beside one")
        ]
        print(f"| {named} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
