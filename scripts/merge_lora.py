"""Merge a LoRA adapter into its base model."""

from tandem.errors import script_main
from tandem.models.merge import MergeOptions, merge
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (MergeOptions,), prog="merge_lora.py", description=__doc__)
    merge(options)
    save(f"{options.output_dir.rstrip('/')}.yaml", options)


if __name__ == "__main__":
    script_main(main)
