"""Have a judge compare the answers of two models, after trying the judge itself on labelled pairs."""

from tandem.commands.judge import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
