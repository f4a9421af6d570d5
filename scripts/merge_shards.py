"""Make a model's or adapter's folder of a checkpoint that FSDP has saved in shards."""

from tandem.commands.merge_shards import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
