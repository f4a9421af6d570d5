"""Draw several answers to each prompt from one or several models."""

from tandem.commands.sample import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
