"""Preparation of pairs: seconds and memory of a plain loop, of the preparation, and of a start that finds its tokens.

    python bench/preparation.py --model FOLDER                      # 20,000 pairs of the size of HH's
    python bench/preparation.py --model FOLDER --pairs 100000 --plain 0

The pairs are the HH file's, over and over, with their number at the end of both answers. Each way runs in a process of
its own, one after the other; the clock starts when the libraries are imported and the tokenizer is loaded. Memory is
what all processes of a way hold beyond that (PSS: shared pages counted once), files that are mapped among it. Prints a
table for RESULTS.md.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.options.parsing import parse
from tandem.training.option_sets import DPOOptionSet, classes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.held import held  # noqa: E402

HH = ROOT.parent / "shared" / "data" / "hh_harmless_base_test_part1.jsonl.gz"
WAYS = ("plain loop", "preparation", "second start")


def write_pairs(path: Path, count: int, data: Path) -> None:
    pairs = load_pairs(DataOptions(str(data), max_bad_rows=100), "train")
    with path.open("w") as file:
        for number, pair in zip(range(count), itertools.cycle(pairs), strict=False):
            sides = {
                side: [pair[side][0] | {"content": f"{pair[side][0]['content']} {number}"}, *pair[side][1:]]
                for side in ("chosen", "rejected")
            }
            file.write(json.dumps({"prompt": pair["prompt"], **sides}) + "\n")


def run_of(model: str, data: Path, cache: Path) -> DPOOptionSet:
    argv = f"--model_name_or_path {model} --output_dir out --dataset_name {data} --token_cache {cache}".split()
    return DPOOptionSet(*parse(argv, classes(DPOOptionSet), prog="bench"))


def plain(run: DPOOptionSet, tokenizer: Any) -> tuple[Any, str]:
    """The pairs by one process and in its memory."""
    from datasets import Dataset

    from tandem.data.pairs import rendered
    from tandem.data.sources import load_training
    from tandem.data.tokenized import token_hash, tokenize_rows

    rows = [rendered(row, run.text, tokenizer) for row in load_training(run.data)]
    tokenized = zip(tokenize_rows(rows, tokenizer), rows, strict=True)
    pairs = [pair | {"pair_id": row["pair_id"]} for pair, row in tokenized]
    data = Dataset.from_list([pair for pair in pairs if len(pair["prompt_ids"]) < run.text.max_length])
    return data, token_hash({"train_dataset": data})


def one(way: str, model: str, data: Path, cache: Path) -> None:
    """What a process of one way does: it says `ready`, and at the end what it made and in how many seconds."""
    from tandem.models.load import load_tokenizer
    from tandem.training.preparation import training_data

    run = run_of(model, data, cache)
    tokenizer = load_tokenizer(run.model)
    tokenizer("warm")
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    if way == WAYS[0]:
        pairs, tokens = plain(run, tokenizer)
    else:
        made = training_data(run, tokenizer)
        pairs, tokens = made.splits["train_dataset"], made.tokens
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "tokens": tokens, "pairs": len(pairs)}), flush=True)
    sys.stdin.readline()


def measure(arguments: list[str]) -> dict[str, Any]:
    """What `one` says, and the bytes that its processes held at most and at the end, beyond those at its start."""
    process = psutil.Popen(
        [sys.executable, __file__, *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    before = most = held(process)
    process.stdin.write("\n")
    process.stdin.flush()
    said: list[str] = []
    reader = Thread(target=lambda: said.append(process.stdout.readline()))
    reader.start()
    while reader.is_alive():
        most = max(most, held(process))
        reader.join(1.0)
    found = json.loads(said[0]) | {"peak": most - before, "kept": held(process) - before}
    process.communicate("\n")
    return found


MAPS = """
import sys
from pathlib import Path
from tandem.data.token_cache import mapped
table = mapped(Path(sys.argv[1]))
print(sum(column.combine_chunks().flatten().to_numpy().sum() for name, column in zip(table.column_names, table.columns)
          if name.endswith("_ids")), flush=True)
sys.stdin.readline()
"""


def shared(file: Path, ranks: int) -> float:
    """Bytes of the pages of `file` that all of so many processes hold which have read it, over its size."""
    users = [
        psutil.Popen([sys.executable, "-c", MAPS, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(ranks)
    ]
    for user in users:
        user.stdout.readline()
    maps = [part for user in users for part in user.memory_maps() if part.path == str(file)]
    total = sum(part.pss for part in maps)
    for user in users:
        user.communicate(b"\n")
    return total / file.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--plain", type=int, default=20_000, help="pairs of the plain loop; 0: leave it out")
    parser.add_argument("--data", type=Path, default=HH)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "DATA", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, data, cache = options.one
        one(way, options.model, Path(data), Path(cache))
        return
    with tempfile.TemporaryDirectory() as folder:
        found, counts = {}, dict(zip(WAYS, (options.plain, options.pairs, options.pairs), strict=True))
        for way, count in counts.items():
            if count == 0:
                continue
            data = Path(folder) / f"{count}.jsonl"
            if not data.exists():
                write_pairs(data, count, options.data)
            arguments = ["--model", options.model, "--one", way, str(data), f"{folder}/cache"]
            found[way] = measure(arguments)
        if counts[WAYS[0]] == options.pairs:
            assert len({each["tokens"] for each in found.values()}) == 1, "other tokens"
        (file,) = Path(folder).glob("cache/*/train_dataset.arrow")
        copies = shared(file, options.ranks)
        print("| way | pairs | seconds | ms a pair | peak KiB a pair | kept KiB a pair |\n|---|---|---|---|---|---|")
        for way, each in found.items():
            count, kib = each["pairs"], 1024 * each["pairs"]
            print(
                f"| {way} | {count:,} | {each['seconds']:.1f} | {1000 * each['seconds'] / count:.2f} "
                f"| {each['peak'] / kib:.1f} | {each['kept'] / kib:.1f} |"
            )
        if WAYS[0] in found:
            rates = [found[way]["seconds"] / found[way]["pairs"] for way in WAYS[:2]]
            print(f"the preparation is {rates[0] / rates[1]:.2f} times faster than the plain loop")
        print(f"{options.ranks} processes that read it hold {copies:.2f} times the file together")


if __name__ == "__main__":
    main()
