"""Rank several models by the verdicts of one judge or more on every pair of them."""

from tandem.commands.rank import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
