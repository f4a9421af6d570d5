"""Write report.html, the page to open when a run has ended."""

from tandem.commands.report import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
