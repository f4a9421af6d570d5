"""Merge a LoRA adapter into its base model."""

from tandem.models.merge import MergeOptions, merge
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (MergeOptions,), prog="merge_lora.py", description=__doc__)
    merge(options)
    save(f"{options.output_dir.rstrip('/')}.yaml", options)
