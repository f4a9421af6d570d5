"""How what surrounds the training step grows with the number of items: seconds at 1,000, 10,000 and 100,000.

    python bench/scale.py                                   # 1,000 and 10,000, some minutes
    python bench/scale.py --items 1000 10000 100000         # as far as the hour goes
    python bench/scale.py --parts keys cache resume

Each part and size runs in a process of its own; imports and what is set up beforehand are not counted. CPU seconds are
those of all its processes. "growth" is the exponent of a power law through all sizes, by least squares over logarithms:
1 is linear. TRL is beside where it has the same step. Prints rows for RESULTS.md.

    prepare   pairs of HH's size: files → rendered, tokenized, ready to train; `again`: a second start with the same
    trl       TRL's own `_prepare_dataset` of the same rows
    keys      keys of pairs in the reference cache
    cache     entries written in batches of 8, then all read
    monitor   optimizer steps of 32 pairs recorded
    resume    a run of so many recorded steps cut back to its half
    save      rank 0's wait for one more save with --mount_dir, of a run of so many recorded steps
    decode    prompts answered by a random model of 2 layers, 32 wide, 8 tokens each: what a prompt costs beside a model
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

ROOT = Path(__file__).parents[1]
MODEL = Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"
# One more each: 100,000 recorded steps are as many files, with two waits for the disk each
LIMITS = {"monitor": 10_000}


class Clock:
    """Seconds between `with clock("name")` and its end."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu()
        yield
        self.found[name] = [time.perf_counter() - wall, _cpu() - cpu]


def _cpu() -> float:
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, whose))


def prepare(clock: Clock, count: int, folder: Path, model: str) -> None:
    from bench.lint import HH, write_pairs
    from tandem.models.load import load_tokenizer
    from tandem.options.model import ModelOptions
    from tandem.options.parsing import parse
    from tandem.training.option_sets import DPOOptionSet, classes
    from tandem.training.preparation import training_data

    os.environ["TANDEM_CACHE"] = str(folder / "cache")
    write_pairs(folder / "pairs.jsonl", count, HH)
    flags = ["--model_name_or_path", model, "--dataset_name", str(folder / "pairs.jsonl"), "--output_dir", str(folder)]
    flags += ["--max_bad_rows", str(count)]
    run = DPOOptionSet(*parse(flags, classes(DPOOptionSet), prog="dpo.py", description=None))
    tokenizer = load_tokenizer(ModelOptions(model_name_or_path=model))
    for name in ("prepare", "again"):
        with clock(name):
            training_data(run, tokenizer)


def trl(clock: Clock, count: int, folder: Path, model: str) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    from bench.lint import HH, write_pairs

    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    write_pairs(folder / "pairs.jsonl", count, HH)
    text = AutoTokenizer.from_pretrained(model)
    tiny = LlamaConfig(
        vocab_size=len(text), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(tiny).save_pretrained(folder / "tiny")
    for name in ("trl", "trl again"):
        rows = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / "d"))
        made = DPOConfig(output_dir=str(folder / "out"), use_cpu=True, report_to="none", dataset_num_proc=2)
        policy = LlamaForCausalLM.from_pretrained(folder / "tiny")  # from a folder: TRL loads the reference by its name
        with clock(name):
            DPOTrainer(policy, args=made, train_dataset=rows, processing_class=text)


def keys(clock: Clock, count: int, folder: Path, model: str) -> None:
    from tandem.engine.ref_cache import pair_key

    ids = np.random.default_rng(0).integers(0, 49_000, 244, np.int32)
    with clock("keys"):
        for number in range(count):
            ids[0] = number
            pair_key("0" * 32, [ids, ids[:200]], [44, 30], "float32", None)


def cache(clock: Clock, count: int, folder: Path, model: str) -> None:
    from tandem.engine.ref_cache import RefCache

    made = RefCache(folder)
    names = [number.to_bytes(16, "big") for number in range(count)]
    with clock("cache: write"), made.writer() as write:
        for start in range(0, count, 8):
            write(dict.fromkeys(names[start : start + 8], (-100.0, -120.0)))
    with clock("cache: read"):
        assert len(made.read(names)) == count


def _recorded(folder: Path, count: int) -> Any:
    """A log of so many steps, written without waiting for the disk."""
    from tandem.monitor.margins import MarginsLog
    from tandem.monitor.tail import TailRecord

    tail = TailRecord(beta=0.1, tau=1.0, p_hat=0.1, over=False)
    log = MarginsLog(folder / "logs" / "margins")
    pairs = [f"{pair:016x}" for pair in range(32)]
    values = np.linspace(-1, 1, 32, dtype=np.float32)

    def record(step: int) -> None:
        log.write_step(1, step, pairs, values, tail)

    sync, os.fsync = os.fsync, lambda _: None
    for step in range(1, count + 1):
        record(step)
    log.flush()
    os.fsync = sync
    return log, record


def monitor(clock: Clock, count: int, folder: Path, model: str) -> None:
    log, record = _recorded(folder, 0)
    with clock("monitor"):
        for step in range(1, count + 1):
            record(step)
        log.flush()


def resume(clock: Clock, count: int, folder: Path, model: str) -> None:
    log, _ = _recorded(folder, count)
    with clock("resume"):
        log.truncate_after(count // 2)


def save(clock: Clock, count: int, folder: Path, model: str) -> None:
    from tandem.runs import RUN, write_json
    from tandem.training.mirror import Mirror

    source, mount = folder / "run", folder / "mount"
    log, record = _recorded(source, count)
    write_json(source / RUN, {"id": "x"})
    mirror: Any = Mirror(source, mount)
    mirror.claim()
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=count)
    with mirror.in_background():
        mirror.on_save(None, state, None)
        mirror.join()
        record(count + 1)
        log.flush()
        with clock("save"):
            mirror.on_save(None, state, None)
        with clock("its copy, by the mirror's thread"):
            mirror.join()


def decode(clock: Clock, count: int, folder: Path, model: str) -> None:
    from tandem.answers.backends.options import GenerationOptions
    from tandem.answers.backends.transformers import TransformersBackend
    from tandem.models.sampling import SamplingOptions
    from tests import tiny

    backend = TransformersBackend(GenerationOptions(dtype="float32"), SamplingOptions(max_new_tokens=8))
    backend.load(str(tiny.save_model(folder / "model", tied=False)))
    prompts = [[{"role": "user", "content": f"say {number} {'red ' * (number % 9)}"}] for number in range(count)]
    with clock("decode"):
        assert len(list(backend.answers(prompts, range(count)))) == count


PARTS: dict[str, Callable[[Clock, int, Path, str], None]] = {
    part.__name__: part for part in (prepare, trl, keys, cache, monitor, resume, save, decode)
}


def growth(items: list[int], seconds: list[float]) -> str:
    if len(items) < 2:
        return "–"
    return f"{np.polyfit(np.log(items), np.log(np.maximum(seconds, 1e-6)), 1)[0]:.2f}"


def measured(part: str, count: int, model: str) -> dict[str, list[float]]:
    """Seconds of wall and of CPU by name, in a process of its own."""
    command = [sys.executable, __file__, "--one", part, str(count), "--model", model]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"{part} of {count:,} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            PARTS[given.one[0]](clock, int(given.one[1]), Path(folder), given.model)
        print(json.dumps(clock.found))
        return
    sizes = " | ".join(f"{count:,}: wall, CPU" for count in given.items)
    print(f"| seconds | {sizes} | growth (CPU) |\n|---|{'---|' * (len(given.items) + 1)}", flush=True)
    for part in given.parts:
        counts = [count for count in given.items if count <= LIMITS.get(part, count)]
        found = [measured(part, count, given.model) for count in counts]
        for name in found[0]:
            took = [each[name] for each in found if name in each]
            cells = [f"{wall:.2f}, {cpu:.2f}" for wall, cpu in took] + ["–"] * (len(given.items) - len(took))
            exponent = growth(counts[: len(took)], [cpu for _, cpu in took])
            print(f"| {name} | {' | '.join(cells)} | {exponent} |", flush=True)


if __name__ == "__main__":
    main()
