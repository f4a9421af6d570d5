"""Make a model's or adapter's folder of a checkpoint that FSDP has saved in shards."""

from tandem.models.merge import MergeShardsOptions, merge_shards
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (MergeShardsOptions,), prog="merge_shards.py", description=__doc__)
    merge_shards(options)
    save(f"{options.output_dir.rstrip('/')}.yaml", options)
