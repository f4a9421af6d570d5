"""Score drawn answers by reward models, a judge or a function of your own."""

from tandem.commands.score import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
