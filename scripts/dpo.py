"""Train a policy on preference pairs with DPO, from a model or an SFT adapter."""

from tandem.commands.dpo import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
