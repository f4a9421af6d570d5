"""Host memory of a sharded start: how many copies of the model all ranks of one machine hold together.

    python -m bench.loading                                  # 8 gloo ranks, a Llama of 300M random weights: 3 minutes
    python -m bench.loading --processes 4 --layers 4 --flags="--use_peft true"

Real runs of dpo.py with accelerate_configs/fsdp.yaml on the CPU. The sum of the ranks' PSS (/proc/PID/smaps_rollup) is
sampled from just before the weights are loaded, and what it then was is taken off. Prints one line of JSON, in copies
of the model as it is trained: the peak while the weights are read (`loading`), what is held once they are (`loaded`),
and the peak of sharding (`sharding`). `_anon` is what the processes have for themselves; the rest are pages of the
files that are read, which the kernel takes back when it needs them.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.distributed import launches, run_script

PHASES = ("loading", "loaded", "sharding")
_PAUSE = 0.05  # seconds between two samples


class Memory:
    """Peaks of the sum of all ranks' PSS, and of its anonymous part, by phase; kept by rank 0."""

    def __init__(self) -> None:
        pids: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(pids, os.getpid())
        self.pids = [int(pid) for pid in pids]
        self.phase, self.peaks = "start", {phase: Counter[str]() for phase in ("start", *PHASES, "end")}
        if torch.distributed.get_rank() == 0:
            self.sample()
            threading.Thread(target=self.watch, daemon=True).start()

    def enter(self, phase: str) -> None:
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            self.sample()
        torch.distributed.barrier()
        self.phase = phase

    def sample(self) -> None:
        peak, found = self.peaks[self.phase], Counter[str]()
        for pid in self.pids:
            found.update(pss(pid))
        for kind, size in found.items():
            peak[kind] = max(peak[kind], size)

    def watch(self) -> None:
        while self.phase != "end":
            self.sample()
            threading.Event().wait(_PAUSE)

    def copies(self, model: int) -> dict[str, float]:
        """Peaks above the start, in models of so many bytes."""
        return {
            f"{phase}{kind.removeprefix('Pss').lower()}": (size - self.peaks["start"][kind]) / model
            for phase in PHASES
            for kind, size in self.peaks[phase].items()
        }


def pss(pid: int) -> dict[str, int]:
    """Proportional set size of a process in bytes, and the anonymous part of it."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("Pss:", "Pss_Anon:")}


def worker(report: str, argv: list[str]) -> None:
    """One rank of the run."""
    run_script.take_cpu_for_gpu()
    from tandem.training import stages
    from tandem.training.trainers import sharding, trl  # noqa: F401  what is imported later would count as the model's

    load, shard, watched = stages.load_model, sharding.fsdp2_prepare_model, list[Memory]()

    def loaded(*args: Any, **kwargs: Any) -> Any:
        if not watched:
            watched.append(Memory())
            watched[0].enter("loading")
        return load(*args, **kwargs)

    def sharded(accelerator: Any, model: Any) -> Any:
        memory = watched[0]
        if memory.phase != "loading":
            return shard(accelerator, model)
        size = sum(own.numel() * own.element_size() for own in model.parameters())
        memory.enter("loaded")
        memory.enter("sharding")
        result = shard(accelerator, model)
        memory.enter("end")
        if os.environ["RANK"] == "0":
            sizes = {"model_gib": size / 2**30, "start_gib": memory.peaks["start"]["Pss"] / 2**30}
            Path(report).write_text(json.dumps(memory.copies(size) | sizes))
        return result

    stages.load_model, sharding.fsdp2_prepare_model = loaded, sharded
    runpy.run_path(str(launches.ROOT / "scripts" / "dpo.py"))["main"](argv)


def save_model(folder: Path, layers: int, width: int) -> Path:
    """A Llama of random bfloat16 weights: 12 MiB of parameters a layer at width 1024, and a vocabulary of 8,192."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
        **{name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def measure(folder: Path, processes: int, layers: int, width: int, flags: list[str]) -> dict[str, float]:
    """Copies of the model in the ranks' memory by phase, `_anon` of the anonymous part; and sizes in GiB."""
    model, report = save_model(folder / "model", layers, width), folder / "report.json"
    data = tiny.save_pairs(folder / "pairs.jsonl", tiny.hh_rows(processes))
    command = [
        *launches.launcher("fsdp", processes), "-m", "bench.loading", "--worker", str(report),
        "--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(folder / "run"),
        "--ref_cache", str(folder / "cache"), "--max_steps", "1", "--save_strategy", "no", "--bf16", "true",
        "--per_device_train_batch_size", "1", "--max_length", "64", *flags,
    ]  # fmt: skip
    environment = os.environ | launches.ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(done.stderr[-5000:])
    found: dict[str, float] = json.loads(report.read_text())
    return found


def main() -> None:
    if "--worker" in sys.argv:
        at = sys.argv.index("--worker")
        return worker(sys.argv[at + 1], sys.argv[at + 2 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--flags", default="", help="of dpo.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.processes, arguments.layers, arguments.width, arguments.flags.split())
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
