"""Write report.html, the one page on a run that a person opens at its end."""

from tandem.commands.report import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
