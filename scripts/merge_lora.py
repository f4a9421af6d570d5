"""Merge a LoRA adapter into its base model."""

from tandem.commands.merge_lora import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
