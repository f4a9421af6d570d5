"""Have a judge compare the answers of two models; the judge itself is tested on labelled pairs first."""

from tandem.commands.judge import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
