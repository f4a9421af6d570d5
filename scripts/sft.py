"""Fine-tune a model on the chosen answers, the step before DPO."""

from tandem.config import parse
from tandem.data.options import DataOptions
from tandem.errors import script_main
from tandem.options import GaudiOptions, LoraOptions, ModelOptions, SFTOptions, TextOptions, explain_unknown

OPTIONS = (ModelOptions, LoraOptions, TextOptions, DataOptions, SFTOptions, GaudiOptions)


def main(argv: list[str]) -> None:
    options = parse(argv, OPTIONS, prog="sft.py", description=__doc__, explain_unknown=explain_unknown)
    from tandem.training import run_sft  # after the options: importing TRL takes seconds

    run_sft(*options)


if __name__ == "__main__":
    script_main(main)
