"""Have models answer the same held-out prompts under the same sampling."""

from tandem.commands.generate import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
