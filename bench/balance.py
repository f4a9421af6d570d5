"""Slowest process over the mean, with and without dealing each optimizer step's pairs evenly.

    python bench/balance.py                    # simulated, on the lengths of real pairs
    python bench/balance.py --run 2            # two processes, each held to one core, train for real; 4 counts tokens

The simulation takes full optimizer steps of pairs drawn at random and gives, for each setting, the mean over the steps
of the slowest process's cost over the mean cost: as sampled, as dealt, and the least that equal counts of pairs allow
(`Dealing.bound`). "unequal" is what unequal counts would reach, by differencing without counts for DDP, and for FSDP by
filling each round from the longest pair on; "largest" is the largest micro-batch over the mean one. Prints rows for
RESULTS.md.
"""

import argparse
import gzip
import heapq
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from datasets import Dataset
from safetensors.numpy import load_file
from transformers import AutoConfig

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render
from tandem.data.tokenized import tokenize_rows
from tandem.engine.balance import Dealing, Waits
from tandem.engine.layout import PAIR_LAYOUT
from tandem.engine.lengths import PairLengths
from tandem.models.load import load_tokenizer
from tandem.monitor.margins import read_margins, read_margins_log
from tandem.options.model import ModelOptions
from tandem.training.dealing import pair_costs

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
HH, SHAREGPT = SHARED / "hh_harmless_base_test_part1.jsonl.gz", SHARED / "sharegpt_dpo_en_demo.json.gz"
SETS = {"HH 512": (HH, 512), "HH 1024": (HH, 1024), "ShareGPT 2048": (SHAREGPT, 2048)}
# Processes, pairs of a micro-batch, micro-batches of a step, when the processes wait
SETTINGS: tuple[tuple[int, int, int, Waits], ...] = (
    (8, 4, 1, "step"), (8, 1, 4, "step"), (8, 1, 4, "micro_batch"), (8, 4, 4, "micro_batch"), (64, 4, 1, "step"),
    (64, 1, 4, "micro_batch"),
)  # fmt: skip
STEPS = 200


def costs_of(data: Path, max_length: int, model: str) -> np.ndarray:
    rows = load_pairs(DataOptions(dataset_name=str(data), max_bad_rows=1000), "train")
    pairs = tokenize_rows([render(row, True) for row in rows], load_tokenizer(ModelOptions(model_name_or_path=model)))
    fitting = Dataset.from_list([pair for pair in pairs if len(pair["prompt_ids"]) < max_length])
    return pair_costs(PairLengths.of(fitting, max_length), AutoConfig.from_pretrained(model), "shared")


def unequal(costs: np.ndarray, dealing: Dealing) -> float:
    """The slowest process where counts may differ: the longest first, each to the process that has least."""
    rounds = 1 if dealing.waits == "step" else dealing.micro_batches
    total, order = 0.0, np.sort(costs)[::-1]
    share = order.sum() / rounds
    start = 0
    for number in range(rounds):
        end, held = start, 0.0  # consecutive pairs of one round: as much in each as in the others
        while end < len(order) and (number == rounds - 1 or held < share or end - start < dealing.ranks):
            held += order[end]
            end += 1
        loads = [0.0] * dealing.ranks
        for cost in order[start:end]:
            heapq.heappush(loads, heapq.heappop(loads) + cost)
        total += max(loads)
        start = end
    return total


def simulate(model: str) -> None:
    print(
        "| pairs | processes × pairs × micro-batches | as sampled | dealt | bound | dealt / bound | unequal | largest |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (data, max_length) in SETS.items():
        costs = costs_of(data, max_length, model)
        for ranks, size, micro_batches, waits in SETTINGS:
            dealing, random = Dealing(ranks, micro_batches, size, waits), np.random.default_rng(0)
            figures, largest, seconds = [], [], 0.0
            for _ in range(STEPS):
                step = random.choice(costs, dealing.in_step, replace=dealing.in_step > len(costs))
                started = time.process_time()
                dealt = step[dealing.step(step)]
                seconds += time.process_time() - started
                mean = step.sum() / ranks
                times = [dealing.time(step), dealing.time(dealt), dealing.bound(step), unequal(step, dealing)]
                figures.append(np.array(times) / mean)
                largest.append([each.reshape(-1, size).sum(1).max() / mean * micro_batches for each in (step, dealt)])
            sampled, dealt_, bound, other = np.mean(figures, axis=0)
            before, after = np.mean(largest, axis=0)
            kind = "DDP" if waits == "step" else "FSDP"
            print(
                f"| {name} | {ranks} × {size} × {micro_batches} {kind} | {sampled:.2f} | **{dealt_:.3f}** "
                f"| {bound:.3f} "
                f"| {np.mean([each[1] / each[2] for each in figures]):.3f} | {other:.3f} | {before:.2f} → {after:.2f} |"
            )
        print(f"a step of {dealing.in_step} pairs is dealt in {seconds / STEPS * 1e3:.1f} ms", file=sys.stderr)


def run(processes: int, model: str, steps: int, turns: int) -> None:
    """Train each way in turns, then say how losses, margins, weights, tokens and seconds compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "pairs.jsonl"
        with gzip.open(HH, "rt") as file:
            lines = file.read().splitlines()
        data.write_text("\n".join(lines[: 4 * processes * steps]) + "\n")
        runs: dict[str, list[Path]] = {"false": [], "true": []}
        for number in range(turns):
            for balance, done in runs.items():
                done.append(folder / f"{balance}_{number}")
                _train(processes, f"""
                    --model_name_or_path {model} --dataset_name {data} --max_bad_rows 100 --output_dir {done[-1]}
                    --use_cpu true --bf16 false --use_peft true --max_steps {steps} --per_device_train_batch_size 4
                    --logging_steps 1 --max_length 512 --save_strategy no --gradient_checkpointing false
                    --ref_cache {folder}/cache --balance_ranks {balance} --learning_rate 1e-4
                """)  # fmt: skip
        print(f"{processes} processes, {steps} steps of 4 pairs each:")
        for balance, done in runs.items():
            seconds = [_metrics(each)["train"]["train_runtime"] for each in done]
            uneven = _unevenness(done[0], processes)
            print(f"  {'dealt' if balance == 'true' else 'as sampled'}: {seconds} s; slowest over mean {uneven:.3f}")
        for what, difference in _differences(runs["false"][0], runs["true"][0]).items():
            print(f"  {what} differ by at most {difference:.1e}")


def _train(processes: int, flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", __file__, "--rank"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *flags.split()], check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def _metrics(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "training_metrics.json").read_text())
    return metrics


def _unevenness(run: Path, processes: int) -> float:
    """Of the distinct tokens that each process laid out in each step: the slowest's over the mean, over the steps."""
    tokens = np.array([json.loads((run / f"tokens_{rank}.json").read_text()) for rank in range(processes)])
    return float(tokens.max(0).sum() / tokens.mean(0).sum())


def _differences(one: Path, other: Path) -> dict[str, float]:
    losses = [[entry["loss"] for entry in _metrics(run)["log_history"] if "loss" in entry] for run in (one, other)]
    margins, weights = [], []
    for folder in (one, other):
        kept = folder / "logs" / "margins"
        steps = [read_margins(kept / step["npy"]) for step in read_margins_log(kept)[0]]
        margins.append({str(row["pair_id"]): float(row["margin"]) for step in steps for row in step})
        weights.append(load_file(folder / "adapter_model.safetensors"))
    return {
        "losses": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "margins, in nats,": max(abs(margins[0][pair] - margins[1][pair]) for pair in margins[0] | margins[1]),
        "weights": max(float(np.abs(weights[0][name] - weights[1][name]).max()) for name in weights[0]),
    }


def rank(argv: list[str]) -> None:
    """One process of a run, held to one core, which writes down the distinct tokens of each of its micro-batches."""
    own, cores = int(os.environ["LOCAL_RANK"]), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[own % len(cores)]})
    from tandem.commands import dpo
    from tandem.training.trainers.trl import TandemDPOTrainer

    tokens: list[int] = []
    compute = TandemDPOTrainer.compute_loss

    def counting(self: Any, model: Any, inputs: Any, *given: Any, **keywords: Any) -> Any:
        tokens.append(inputs[PAIR_LAYOUT].n_tokens)
        return compute(self, model, inputs, *given, **keywords)

    TandemDPOTrainer.compute_loss = counting  # type: ignore[method-assign]
    dpo.main(argv)
    output = Path(argv[argv.index("--output_dir") + 1])
    (output / f"tokens_{own}.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank(sys.argv[sys.argv.index("--rank") + 1 :])
        sys.exit()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--run", type=int, help="train with so many processes instead")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2, help="runs each way")
    given = parser.parse_args()
    run(given.run, given.model, given.steps, given.turns) if given.run else simulate(given.model)
