"""Draw several answers to each prompt from one or several models."""

from pathlib import Path

from tandem import ranks
from tandem.answers.backends.options import FORMER, GenerationOptions
from tandem.data.options import DataOptions
from tandem.models.sampling import SamplingOptions
from tandem.options.parsing import parse, save
from tandem.rounds.options import SampleOptions
from tandem.rounds.prompts import held_out_prompts, training_prompts
from tandem.rounds.sample import sample


def main(argv: list[str]) -> None:
    classes = (SampleOptions, GenerationOptions, SamplingOptions, DataOptions)
    options, backend, sampling, data = parse(argv, classes, prog="sample.py", description=__doc__, foreign=FORMER)
    file = sample(options, backend, sampling, (held_out_prompts if options.held_out else training_prompts)(data))
    if ranks.is_first():
        save(Path(options.output_dir) / "sample.yaml", options, backend, sampling, data)
        print(file)
