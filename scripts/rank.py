"""Rank several models by the verdicts of one or more judges on every pair of models."""

from tandem.commands.rank import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
