"""Fine-tune a model on the chosen answers, the step before DPO."""

from tandem.commands.sft import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
