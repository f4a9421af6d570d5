"""Answer held-out prompts with one model."""

from pathlib import Path

from tandem.config import parse, save
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.errors import script_main
from tandem.generate import GenerateOptions, generate, held_out_prompts
from tandem.sampling import SamplingOptions


def main(argv: list[str]) -> None:
    classes = (GenerateOptions, SamplingOptions, DataOptions)
    options, sampling, data = parse(argv, classes, prog="generate.py", description=__doc__)
    prompts = held_out_prompts(load_held_out(data), sampling.max_prompts)
    path = generate(options.model_name_or_path, options.label, prompts, sampling, Path(options.output_dir))
    save(path.with_suffix(".yaml"), options, sampling, data)
    print(path)


if __name__ == "__main__":
    script_main(main)
