"""One measured training run in a process of its own; prints one JSON line. Started by `bench/run.py`."""

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from arithmetic import Shape, step
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.engine.pairs import PairCollator
from tandem.models.load import load_model, load_tokenizer
from tandem.models.lora import lora_config
from tandem.monitor.options import MonitorOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import EngineOptions
from tandem.training.cpu_memory import prepare_for_training
from tandem.training.trainers.trl import TandemDPOTrainer

# Llama's shapes: hidden, intermediate, layers, heads, key-value heads. `tiny` only shows that the mode runs.
LLAMAS = {
    "tiny": (64, 128, 2, 4, 2),
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
}

# Of Llama 3, whose head weighs more than that of the model that lends its tokenizer
VOCABULARY = 128256

LORA = LoraOptions(use_peft=True)


class StockTrainer(DPOTrainer):
    """TRL's trainer as it is, on the same tokens."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class StepClock(TrainerCallback):
    """How long each optimizer step but the first took, and after each a sample of what plain products of the layers'
    shapes reach, since a shared machine is not equally fast from one minute to the next.

    The median step is one without the cost of first touching memory, which a short run pays in its first three steps
    and a real one never again.
    """

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> None:
        def random(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, dtype=dtype, device=device)

        # Into memory of their own: where the allocator puts results is not what is asked for
        self.products = [(random(tokens, i), random(i, o), random(tokens, o)) for i, o in shape.matrices]
        self.flops = 2 * tokens * sum(i * o for i, o in shape.matrices)
        self.seconds: list[float] = []
        self.matmul_rates: list[float] = []
        self.sampling = {"wall": 0.0, "cpu": 0.0}
        self.resumed: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        if self.resumed is not None:
            self.seconds.append(time.perf_counter() - self.resumed)
        timed(self.sample, self.sampling)()
        self.resumed = time.perf_counter()

    def sample(self) -> None:
        """Measure the FLOP/s of the products for a third of a second, after one round that is not counted."""
        self.multiply()
        started, rounds = time.perf_counter(), 0
        while time.perf_counter() - started < 0.33:
            self.multiply()
            rounds += 1
        self.matmul_rates.append(rounds * self.flops / (time.perf_counter() - started))

    def multiply(self) -> None:
        for left, right, out in self.products:
            torch.mm(left, right, out=out)
        synchronize()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[..., Any], clock: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            clock["wall"] += time.perf_counter() - wall
            clock["cpu"] += time.process_time() - cpu

    return run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--side", choices=("trl", "trl_precompute", "shared", "packed", "padded"), required=True)
    parser.add_argument("--model", required=True, help="folder: its weights, or only its tokenizer with --random")
    parser.add_argument("--random", choices=tuple(LLAMAS), help="a Llama of this size with random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--warm", action="store_true", help="score the reference before the clock starts")
    return parser.parse_args()


def main() -> None:
    options = parse()
    source = ModelOptions(model_name_or_path=options.model)
    tokenizer = load_tokenizer(source)
    model = random_llama(options, tokenizer) if options.random else load_model(source)
    model.config.use_cache = False
    rows = load_pairs(DataOptions(dataset_name=options.data, max_bad_rows=1000), "train")
    pairs = [
        tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows[: 4 * options.pairs]
    ]
    pairs = [pair for pair in pairs if len(pair["prompt_ids"]) < options.max_length][: options.pairs]
    lengths = [_lengths(pair, options.max_length) for pair in pairs]
    tokens = sum(map(sum, lengths)) * options.batch // len(lengths)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    steps = StepClock(Shape.of(model.config), tokens, dtype, options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock, monitoring = run(options, model, tokenizer, Dataset.from_list(pairs), folder, steps)
    print(json.dumps(figures(options, trainer, [lengths[i] for i in _order(trainer)], clock, monitoring, steps)))


def random_llama(options: argparse.Namespace, tokenizer: Any) -> Any:
    hidden, intermediate, layers, heads, kv_heads = LLAMAS[options.random]
    config = LlamaConfig(
        vocab_size=len(tokenizer) if options.random == "tiny" else VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if options.bf16 else torch.float32)


def run(
    options: argparse.Namespace, model: Any, tokenizer: Any, dataset: Dataset, folder: str, steps: StepClock
) -> tuple[Any, dict[str, float], dict[str, float]]:
    """Train for one epoch; the trainer, the clock of reference and training, and the monitor's own."""
    ours = options.side in ("shared", "packed", "padded")
    cls = TandemDPOTrainer if ours else StockTrainer
    clock, monitoring = {"wall": 0.0, "cpu": 0.0}, {"wall": 0.0, "cpu": 0.0}
    if not options.warm:
        cls._precompute_ref_logps = timed(cls._precompute_ref_logps, clock)
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_length=options.max_length,
        num_train_epochs=1,
        learning_rate=1e-6,
        bf16=options.bf16,
        use_cpu=options.device == "cpu",
        gradient_checkpointing=options.checkpointing,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        precompute_ref_log_probs=ours or options.side == "trl_precompute",
    )
    keywords: dict[str, Any] = {}
    if ours:
        collator = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=options.max_length)
        engine = EngineOptions(layout=options.side, ref_cache=str(Path(folder) / "cache"))
        keywords = {"data_collator": collator, "engine": engine, "monitor": MonitorOptions(), "logs_dir": Path(folder)}
    else:
        dataset = dataset.remove_columns("pair_id")
    if ours and options.device == "cpu":
        prepare_for_training()  # as run_dpo does
    lora = lora_config(LORA) if options.lora else None
    if options.side == "trl" and options.random and not options.lora:
        keywords["ref_model"] = copy.deepcopy(model)  # TRL would load one by the model's name, which this one has not
    trainer: Any = cls(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, **keywords
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(steps)
    if ours:
        trainer.feed.add = timed(trainer.feed.add, monitoring)
        for name in ("collect", "end_step", "interval_logs"):
            setattr(trainer.monitor, name, timed(getattr(trainer.monitor, name), monitoring))
    timed(trainer.train, clock)()
    for name, seconds in steps.sampling.items():
        clock[name] -= seconds
    return trainer, clock, monitoring


def figures(
    options: argparse.Namespace,
    trainer: Any,
    order: list[tuple[int, int, int]],
    clock: dict[str, float],
    monitoring: dict[str, float],
    steps: StepClock,
) -> dict[str, Any]:
    shape = Shape.of(trainer.model.config)
    batches = [order[start : start + options.batch] for start in range(0, len(order), options.batch)]
    layout = options.side if options.side in ("shared", "packed") else "padded"

    rank = LORA.lora_r if options.lora else 0

    def flops(chosen: list[Any], layout: str, reference: bool) -> float:
        return sum(step(shape, batch, layout, rank=rank, reference=reference) for batch in chosen)

    # Stock TRL forwards the reference within each step; otherwise it is scored before the first
    rates = [
        flops([batch], layout, options.side == "trl") / seconds
        for batch, seconds in zip(batches[1:], steps.seconds, strict=True)
    ]
    # Beside the samples before and after the step
    plain = [sum(samples) / 2 for samples in itertools.pairwise(steps.matmul_rates)]
    cold = not options.warm
    on_cuda = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "pairs_per_s": len(order) / clock["wall"],
        "cpu_s": clock["cpu"],
        "peak_gb": peak / 2**30,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "flops_allow": flops(batches, "padded", cold) / flops(batches, layout, cold),
        "flop_rate": statistics.median(rates),
        "matmul_rate": statistics.median(plain),
        "of_matmul": statistics.median(rate / beside for rate, beside in zip(rates, plain, strict=True)),
        "monitor_share": monitoring["wall"] / clock["wall"],
        "unique_tokens": sum(map(sum, order)),
        "wall_s": clock["wall"],
    }


def _lengths(pair: dict[str, list[int]], longest: int) -> tuple[int, int, int]:
    prompt = len(pair["prompt_ids"])
    chosen, rejected = (min(len(pair[side]), longest - prompt) for side in ("chosen_ids", "rejected_ids"))
    return prompt, chosen, rejected


def _order(trainer: Any) -> list[int]:
    """The order in which the trainer's sampler deals the pairs: the same for both sides, by the seed."""
    generator = torch.Generator()
    generator.manual_seed(trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed)
    return torch.randperm(len(trainer.train_dataset), generator=generator).tolist()


if __name__ == "__main__":
    main()
