"""Measure the rounds of a run on their held-out answers, and name the best."""

from tandem.commands.rounds import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
