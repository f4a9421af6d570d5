"""Make a model's or adapter's folder of a checkpoint that FSDP has saved in shards."""

from tandem.errors import script_main
from tandem.models.merge import MergeShardsOptions, merge_shards
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (MergeShardsOptions,), prog="merge_shards.py", description=__doc__)
    merge_shards(options)
    save(f"{options.output_dir.rstrip('/')}.yaml", options)


if __name__ == "__main__":
    script_main(main)
