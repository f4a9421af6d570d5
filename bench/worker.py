"""One measured training run in a process of its own; prints one JSON line. Started by `bench/run.py`."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from arithmetic import Shape, step
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.engine.pairs import PairCollator
from tandem.models import load_model, load_tokenizer, lora_config
from tandem.monitor.options import MonitorOptions
from tandem.options import EngineOptions, LoraOptions, ModelOptions
from tandem.trainers.trl import TandemDPOTrainer


class StockTrainer(DPOTrainer):
    """TRL's trainer as it is, on the same tokens."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def timed(function: Any, clock: dict[str, float]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            clock["wall"] += time.perf_counter() - wall
            clock["cpu"] += time.process_time() - cpu

    return run


def matmul_rate(shape: Shape, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of plain matrix products of the layers' shapes, measured here and now."""
    products = [(torch.randn(tokens, i, dtype=dtype), torch.randn(i, o, dtype=dtype)) for i, o in shape.matrices]
    for left, right in products:
        left @ right
    flops = 2 * tokens * sum(i * o for i, o in shape.matrices)
    started, repeats = time.perf_counter(), 0
    while time.perf_counter() - started < 2:
        for left, right in products:
            left @ right
        repeats += 1
    return repeats * flops / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--side", choices=("trl", "trl_precompute", "shared", "packed", "padded"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--warm", action="store_true", help="score the reference before the clock starts")
    options = parser.parse_args()

    source = ModelOptions(model_name_or_path=options.model)
    tokenizer, model = load_tokenizer(source), load_model(source)
    model.config.use_cache = False
    rows = load_pairs(DataOptions(dataset_name=options.data, max_bad_rows=1000), "train")
    pairs = [
        tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows[: 4 * options.pairs]
    ]
    pairs = [pair for pair in pairs if len(pair["prompt_ids"]) < options.max_length][: options.pairs]

    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, model, tokenizer, Dataset.from_list(pairs), folder)
    print(json.dumps(result))


def measure(options: argparse.Namespace, model: Any, tokenizer: Any, dataset: Dataset, folder: str) -> dict[str, Any]:
    ours = options.side in ("shared", "packed", "padded")
    cls = TandemDPOTrainer if ours else StockTrainer
    clock = {"wall": 0.0, "cpu": 0.0}
    if not options.warm:
        cls._precompute_ref_logps = timed(cls._precompute_ref_logps, clock)
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_length=options.max_length,
        learning_rate=1e-6,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
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
    lora = lora_config(LoraOptions(use_peft=True)) if options.lora else None
    trainer = cls(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, **keywords
    )
    trainer.remove_callback(PrinterCallback)
    timed(trainer.train, clock)()

    shape = Shape.of(model.config)
    lengths = [_lengths(pair, options.max_length) for pair in dataset]
    order = [lengths[index] for index in _order(trainer)]
    batches = [order[start : start + options.batch] for start in range(0, len(order), options.batch)]
    layout = options.side if ours else "padded"
    flops = sum(step(shape, batch, layout, lora=options.lora, reference=not options.warm) for batch in batches)
    allowed = {
        name: sum(step(shape, batch, name, lora=options.lora, reference=not options.warm) for batch in batches)
        for name in ("padded", "packed", "shared")
    }
    tokens = sum(map(sum, order)) // len(batches)
    rate = matmul_rate(shape, tokens, torch.bfloat16 if options.bf16 else torch.float32)
    return {
        "pairs_per_s": len(order) / clock["wall"],
        "cpu_s": clock["cpu"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "flops_allow": allowed["padded"] / allowed[layout],
        "flop_rate": flops / clock["wall"],
        "matmul_rate": rate,
        "unique_tokens": sum(map(sum, order)),
        "wall_s": clock["wall"],
        "pairs": len(order),
    }


def _lengths(pair: dict[str, list[int]], longest: int) -> tuple[int, int, int]:
    prompt = len(pair["prompt_ids"])
    return prompt, *(min(len(pair[side]), longest - prompt) for side in ("chosen_ids", "rejected_ids"))


def _order(trainer: Any) -> list[int]:
    """The order in which the trainer's sampler deals the pairs: the same for both sides, by the seed."""
    generator = torch.Generator()
    generator.manual_seed(trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed)
    return torch.randperm(len(trainer.train_dataset), generator=generator).tolist()


if __name__ == "__main__":
    main()
