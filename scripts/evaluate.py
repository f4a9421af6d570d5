"""Measure the SFT and DPO models on held-out pairs against a reference model."""

from tandem.commands.evaluate import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
