"""Fine-tune a model on the chosen answers, the step before DPO."""

from tandem.config import parse
from tandem.errors import script_main
from tandem.options import explain_unknown
from tandem.run_options import SFTRun, classes


def main(argv: list[str]) -> None:
    run = SFTRun(*parse(argv, classes(SFTRun), prog="sft.py", description=__doc__, explain_unknown=explain_unknown))
    from tandem.training import run_sft  # after the options: importing TRL takes seconds

    run_sft(run)


if __name__ == "__main__":
    script_main(main)
