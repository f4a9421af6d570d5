"""Tokens a second of answers drawn on this machine, beside plain `generate` of transformers with the same sampling.

    python bench/decode.py [--model FOLDER] [--prompts 12 32] [--max_new_tokens 64] [--repeats 3]

Plain: one batch of all prompts, padded at the left, `do_sample=True` with temperature and top_p, as transformers' own
documentation does it. Tandem: `TransformersBackend` as generate.py and compare.py use it, from messages to text. Both
models are in this process, and the two take turns. Tokens after an answer's end are not counted. Prints rows for
RESULTS.md: medians of the repeats, and the CPU seconds of a thousand tokens.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tandem.answers.backends.options import GenerationOptions
from tandem.answers.backends.transformers import TransformersBackend
from tandem.data.held_out import held_out_prompts
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.models.decoding import until_end
from tandem.models.sampling import SamplingOptions

ROOT = Path(__file__).parents[1]
HH = ROOT.parent / "shared" / "data" / "hh_harmless_base_test_part1.jsonl.gz"
MODEL = Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"


def plain(model: str, sampling: SamplingOptions, prompts: list[Any]) -> Callable[[int], int]:
    """Draws with a seed, and says how many tokens it drew."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in prompts]
    ends = {tokenizer.eos_token_id}

    def draw(seed: int) -> int:
        torch.manual_seed(seed)
        batch = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=sampling.max_prompt_length,
            add_special_tokens=False,
        )
        output = loaded.generate(
            **batch,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = output[:, batch["input_ids"].shape[1] :].tolist()
        tokenizer.batch_decode(answers, skip_special_tokens=True)
        return sum(len(until_end(answer, ends)) for answer in answers)

    return draw


def ours(model: str, sampling: SamplingOptions, prompts: list[Any]) -> Callable[[int], int]:
    backend = TransformersBackend(GenerationOptions(dtype="float32"), sampling)
    backend.load(model)

    def draw(seed: int) -> int:
        sampling.seed = seed
        return sum(answer.n_tokens or 0 for _, answer in backend.answers(prompts, range(len(prompts))))

    return draw


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--data", default=str(HH), help="pairs whose prompts are answered")
    parser.add_argument("--prompts", type=int, nargs="+", default=[12, 32])
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    sampling = SamplingOptions(max_new_tokens=given.max_new_tokens)
    pairs = load_held_out(DataOptions(dataset_name=given.data, dataset_test_split="train", max_bad_rows=1000))
    rows = []
    for count in given.prompts:
        prompts = held_out_prompts(pairs, count)
        sides = {"plain": plain(given.model, sampling, prompts), "tandem": ours(given.model, sampling, prompts)}
        rates: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for side in sides.values():
            side(0)  # first use of the memory
        for repeat in range(given.repeats):
            for name, draw in sides.items():
                started, used = time.perf_counter(), cpu_seconds()
                tokens = draw(1 + repeat)
                rates[name].append((tokens / (time.perf_counter() - started), (cpu_seconds() - used) / tokens * 1000))
        (plain_rate, plain_cpu), (rate, cpu) = (
            [statistics.median(values) for values in zip(*rates[name], strict=True)] for name in ("plain", "tandem")
        )
        rows.append(
            f"| {count} | {plain_rate:.1f} | {rate:.1f} | **{rate / plain_rate:.2f}** | {plain_cpu:.1f} | {cpu:.1f} |"
        )
        print(json.dumps({"prompts": count, "runs": rates}), flush=True)
    print("| prompts | plain tokens/s | Tandem tokens/s | ratio | plain CPU s / 1,000 tokens | Tandem |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
