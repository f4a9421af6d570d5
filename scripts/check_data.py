"""Look at preference pairs before training on them."""

from tandem.commands.check_data import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
