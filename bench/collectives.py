"""Bytes that each process hands to its collectives in one optimizer step, counted on real runs and predicted.

    python -m bench.collectives         # DDP and FSDP; with the extra deepspeed, ZeRO too: about 2 minutes

A small Llama on 2 and 4 gloo processes, float32. Counted: the elements of every c10d collective of an optimizer step
that are floating point and more than a scalar or a metric. Predicted: docs/scaling.md. Prints a Markdown table.
"""

import argparse
import importlib.util
import json
import os
import runpy
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests import tiny
from tests.distributed import launches, run_script

STEPS = 3
LAYERS = 4
# Which argument of a c10d op is as long as what all ranks hold together
_WHOLE = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "broadcast_": 0, "allgather_": 0}
# Metrics, margins and gradient norms are shorter than any weight of the model below
_SHORTEST = 256


class CollectiveBytes(TorchDispatchMode):
    """Counts, by phase and op, the bytes of floating-point collectives of this process."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.counted: dict[str, Counter[str]] = {"step": Counter(), "reference": Counter(), "other": Counter()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in _WHOLE:
            tensors = [leaf for leaf in tree_leaves(args[_WHOLE[func._opname]]) if isinstance(leaf, torch.Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())
            if size >= 4 * _SHORTEST:
                self.counted[self.phase][func._opname] += size
        elif func._opname == "all_gather_into_tensor":  # of a DTensor: input, number of processes, group
            self.counted[self.phase]["_allgather_base_"] += args[0].numel() * args[0].element_size() * args[1]
        elif func.namespace == "c10d":
            self.counted[self.phase][f"not counted: {func._opname}"] += 1
        return func(*args, **(kwargs or {}))


class _Steps(TrainerCallback):
    def __init__(self, counter: CollectiveBytes) -> None:
        self.counter = counter

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.counter.phase = "step"

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.counter.phase = "other"


def worker(kind: str, report: str, argv: list[str]) -> None:
    """One process of a counted run."""
    if kind == "gpu":
        run_script.take_cpu_for_gpu()
    from tandem.training.trainers.reference_scorer import ReferenceScorer
    from tandem.training.trainers.trl import TandemDPOTrainer

    counter = CollectiveBytes()
    built, scored = TandemDPOTrainer.__init__, ReferenceScorer.with_columns

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        self.add_callback(_Steps(counter))

    def score(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.phase = "reference"
        try:
            return scored(self, *args, **kwargs)
        finally:
            counter.phase = "other"

    TandemDPOTrainer.__init__, ReferenceScorer.with_columns = init, score
    with counter:
        runpy.run_path(str(launches.ROOT / "scripts" / "dpo.py"))["main"](argv)
    if os.environ["RANK"] == "0":
        Path(report).write_text(json.dumps(counter.counted))


def save_model(folder: Path) -> dict[str, int]:
    """An untied Llama, and the numbers of its parameters: of its layers, its embedding, and its tail (norm, head)."""
    text = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(text) + -len(text) % 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"layers": layers, "embedding": embedding, "tail": total - layers - embedding, "total": total}


def lora_parameters(config: LlamaConfig, rank: int = 16) -> int:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return config.num_hidden_layers * rank * sum(i + o for i, o in shapes)


def predicted(engine: str, lora: bool, sizes: dict[str, int], adapter: int, batches: int) -> dict[str, float]:
    """Elements gathered and reduced in one optimizer step of one micro-batch, and in each batch of the reference."""
    trained = adapter if lora else sizes["total"]
    held = sizes["total"] + (adapter if lora else 0)
    layers = sizes["layers"] + (adapter if lora else 0)
    again = layers + sizes["embedding"]  # resharded after the forward
    # The tail stays gathered between the batches of the reference
    once = held - sizes["tail"] * (1 - 1 / batches)
    return {
        "ddp": {"gathered": 0, "reduced": trained, "reference": 0},
        "fsdp": {"gathered": held + again, "reduced": trained, "reference": once},
        "deepspeed_zero2": {"gathered": trained, "reduced": trained, "reference": 0},
        # A checkpointed layer is gathered for the forward, again to be recomputed, and again for its backward
        "deepspeed_zero3": {"gathered": held + 2 * layers, "reduced": trained, "reference": sizes["total"]},
    }[engine]


def large_model_config(folder: Path) -> Path:
    """accelerate_configs/deepspeed_zero3.yaml, less the limits below which DeepSpeed 0.19.8 keeps what it has gathered
    (100,000 elements a weight, 10⁹ in all): this model is below them, and a large one is not."""
    config = yaml.safe_load((launches.ROOT / "accelerate_configs" / "deepspeed_zero3.yaml").read_text())
    given = config.pop("deepspeed_config")
    config.pop("mixed_precision")  # its place is the other file
    kept = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True} | dict.fromkeys(kept, 0)
    sizes = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero} | dict.fromkeys(sizes, "auto")))
    config["deepspeed_config"] = {
        "deepspeed_config_file": str(folder / "zero3.json"),
        "zero3_init_flag": given["zero3_init_flag"],
    }
    path = folder / "zero3.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def counted(engine: str, processes: int, lora: bool, folder: Path) -> dict[str, dict[str, int]]:
    """Bytes by phase and op of rank 0."""
    kind, variables, own = launches.ENGINES[engine]
    report = folder / f"{engine}_{processes}_{lora}.json"
    argv = f"""
        --model_name_or_path {folder}/model --dataset_name {folder}/data --output_dir {report}.run --bf16 false
        --ref_cache {report}.cache --max_steps {STEPS} --per_device_train_batch_size 2 --save_strategy no
        --use_peft {str(lora).lower()} {own}
    """
    command = launches.launcher(engine, processes)
    if engine == "deepspeed_zero3":
        command[command.index("--config_file") + 1] = str(large_model_config(folder))
    command += ["-m", "bench.collectives", "--worker", kind, str(report), *argv.split()]
    done = launches.start(command, variables | {"LOCAL_SIZE": str(processes)})
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(report.read_text())


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, report, *argv = sys.argv[2:]
        worker(kind, report, argv)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    engines = ["ddp", "fsdp"]
    if importlib.util.find_spec("deepspeed"):
        engines += ["deepspeed_zero2", "deepspeed_zero3"]
    parser.add_argument("--configs", nargs="+", choices=engines, default=engines)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = save_model(folder / "model")
        adapter = lora_parameters(LlamaConfig.from_pretrained(folder / "model"))
        (folder / "data").mkdir()
        tiny.save_pairs(folder / "data" / "train.jsonl", tiny.hh_rows(8 * STEPS))
        print(f"{sizes['total']} parameters ({sizes['layers']} in {LAYERS} layers), adapter {adapter}, float32\n")
        print("Predicted / counted MB:\n")
        print("| config | processes | trains | gathered per step | reduced per step | gathered per reference batch |")
        print("|---|---|---|---|---|---|")
        for engine in options.configs:
            for processes in options.processes:
                for lora in (False, True):
                    found = counted(engine, processes, lora, folder)
                    _print_row(engine, processes, lora, found, sizes, adapter)


def _print_row(
    engine: str, processes: int, lora: bool, found: dict[str, dict[str, int]], sizes: dict[str, int], adapter: int
) -> None:
    step, reference = Counter(found["step"]), Counter(found["reference"])
    batches = -(-8 * STEPS // (2 * processes))
    expected = predicted(engine, lora, sizes, adapter, batches)
    got = {
        "gathered": (step["_allgather_base_"] + step["allgather_"] + step["broadcast_"]) / STEPS,
        "reduced": (step["allreduce_"] + step["_reduce_scatter_base_"]) / STEPS,
        "reference": (reference["_allgather_base_"] + reference["allgather_"]) / batches,
    }
    cells = [f"{4 * expected[name] / 1e6:.3f} / {got[name] / 1e6:.3f}" for name in got]
    print(f"| {engine} | {processes} | {'adapter' if lora else 'all'} | {' | '.join(cells)} |", flush=True)
    for phase in ("step", "reference"):
        for op, count in found[phase].items():
            if op.startswith("not counted"):
                print(f"  {phase}: {op} × {count}", file=sys.stderr)


if __name__ == "__main__":
    main()
