"""Make preference pairs of scored answers."""

from tandem.commands.make_pairs import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
