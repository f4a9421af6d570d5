"""Put a checkpoint that FSDP saved in shards together to the folder of a model or adapter."""

from tandem.commands.merge_shards import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
