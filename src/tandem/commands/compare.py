"""Put the answers of the base, SFT and DPO models to held-out prompts side by side."""

from pathlib import Path

from tandem.answers.backends.options import FORMER, GenerationOptions
from tandem.answers.compare import CompareOptions, compare, to_markdown
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.models.sampling import SamplingOptions
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    classes = (CompareOptions, GenerationOptions, SamplingOptions, DataOptions)
    options, backend, sampling, data = parse(argv, classes, prog="compare.py", description=__doc__, foreign=FORMER)
    print(to_markdown(compare(options, backend, sampling, load_held_out(data))))
    save(Path(options.output_dir) / "compare.yaml", options, backend, sampling, data)
