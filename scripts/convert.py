"""Turn another program's recipe into a config of Tandem, with a comment for each key: convert.py RECIPE.yaml"""

from tandem.commands.convert import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
