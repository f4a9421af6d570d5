"""Measure the SFT and DPO models on held-out pairs against a reference model."""

from pathlib import Path

from tandem import ranks
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.evaluation.benchmark import BenchmarkOptions, check_tasks
from tandem.evaluation.evaluate import EvaluateOptions, add_benchmarks, evaluate
from tandem.evaluation.tables import to_markdown
from tandem.options.model import TextOptions
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    classes = (EvaluateOptions, BenchmarkOptions, TextOptions, DataOptions)
    options, benchmark, text, data = parse(argv, classes, prog="evaluate.py", description=__doc__)
    check_tasks(benchmark)
    with ranks.joined():
        results = evaluate(options, text, load_held_out(data))
        if benchmark.benchmark:
            results = add_benchmarks(options, benchmark, results)
    if ranks.is_first():
        print(to_markdown(results))
        save(Path(options.output_file).with_suffix(".yaml"), options, benchmark, text, data)
