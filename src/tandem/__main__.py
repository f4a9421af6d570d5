"""`python -m tandem` and `accelerate launch --module tandem dpo …`: the `tandem` command."""

from tandem.commands.cli import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
