"""Have models answer the same held-out prompts under the same sampling."""

from pathlib import Path

from tandem import ranks
from tandem.answers.backends.options import FORMER, GenerationOptions
from tandem.answers.generate import GenerateOptions, generate
from tandem.data.held_out import held_out_prompts
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.models.sampling import SamplingOptions
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    classes = (GenerateOptions, GenerationOptions, SamplingOptions, DataOptions)
    options, backend, sampling, data = parse(argv, classes, prog="generate.py", description=__doc__, foreign=FORMER)
    prompts = held_out_prompts(load_held_out(data), sampling.max_prompts)
    files = generate(options.by_label, prompts, sampling, backend, Path(options.output_dir))
    if ranks.is_first():
        save(Path(options.output_dir) / "generate.yaml", options, backend, sampling, data)
        print(*files.values(), sep="\n")
