"""Put a checkpoint that FSDP saved in shards together to the folder of a model or adapter."""

from tandem.models.merge import MergeShardsOptions, merge_shards
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (MergeShardsOptions,), prog="merge_shards.py", description=__doc__)
    merge_shards(options)
    save(f"{options.output_dir.rstrip('/')}.yaml", options)
