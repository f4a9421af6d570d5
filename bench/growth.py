"""How the time of a training step grows with its unique tokens, and with the batch size.

    python bench/growth.py        # about three minutes on two cores; writes bench/growth.png

One forward and backward of the pair engine over batches of the HH pairs, and of TRL's padded layout beside it.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from run import HERE, HH
from scipy.stats import linregress
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.engine.forward import add_pair_forward
from tandem.models.load import load_model, load_tokenizer
from tandem.options.model import ModelOptions

BATCHES = (1, 2, 4, 6, 8, 10, 12, 16)
REPEATS = 2


def step_seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    started = time.perf_counter()
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    output.log_probs.sum().backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def measure(source: ModelOptions, layout: str, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Median seconds of a step on each batch, the repeats interleaved."""
    model = load_model(source)
    model.config.use_cache = False
    add_pair_forward(model, layout=layout)
    step_seconds(model, batches[-1])  # the largest first: memory is touched, the probe is done
    rounds = [[step_seconds(model, batch) for batch in batches] for _ in range(REPEATS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--padded", type=int, default=4, help="largest batch of TRL's padded layout")
    options = parser.parse_args()
    source = ModelOptions(model_name_or_path=options.model)
    tokenizer = load_tokenizer(source)
    rows = load_pairs(DataOptions(dataset_name=str(HH), max_bad_rows=1000), "train")
    pairs = [tokenize_pair(render(row, True), tokenizer) for row in rows[: max(BATCHES)]]
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=512)
    batches = [collate(pairs[:size]) for size in BATCHES]
    tokens = [
        sum(min(512, len(p["prompt_ids"]) + len(p["chosen_ids"])) + len(p["rejected_ids"]) for p in pairs[:size])
        for size in BATCHES
    ]
    shared = measure(source, "shared", batches)
    padded = measure(source, "padded", [b for b, size in zip(batches, BATCHES, strict=True) if size <= options.padded])
    fit = linregress(tokens, shared)
    for size, unique, seconds in zip(BATCHES, tokens, shared, strict=True):
        print(f"batch {size:2d}  {unique:5d} unique tokens  {seconds:.2f} s")
    print(f"padded, batch {', '.join(map(str, BATCHES[: len(padded)]))}: {', '.join(f'{s:.2f}' for s in padded)} s")
    print(f"R² = {fit.rvalue**2:.4f}, {1000 * fit.slope:.2f} ms a token, intercept {fit.intercept:.2f} s")
    draw(tokens, shared, padded, fit)


def draw(tokens: list[int], shared: list[float], padded: list[float], fit: Any) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_tokens, by_batch) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    by_tokens.plot(tokens, shared, "o", label="shared")
    by_tokens.axline((0, fit.intercept), slope=fit.slope, linewidth=1, label=f"linear, R² = {fit.rvalue**2:.3f}")
    by_tokens.set(xlabel="unique tokens in the batch", ylabel="seconds, forward and backward", xlim=0, ylim=0)
    by_batch.plot(BATCHES, shared, "o-", label="shared")
    by_batch.plot(BATCHES[: len(padded)], padded, "s-", label="padded (TRL)")
    by_batch.set(xlabel="pairs in the batch", xlim=0, ylim=0)
    for axes in (by_tokens, by_batch):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(HERE / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
