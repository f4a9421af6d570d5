"""Write the Tandem config of another program's recipe: convert.py RECIPE.yaml, with a comment for each key."""

from tandem.commands.convert import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
