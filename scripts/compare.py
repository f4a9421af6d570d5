"""Put the answers of the base, SFT and DPO models to held-out prompts side by side."""

from tandem.commands.compare import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
