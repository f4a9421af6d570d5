"""Print what share of the prompts a pipeline must hold out: `pipelines/dpo_pipeline_sanity.sh` calls it.

    python -m tandem.launch.held_out DATASET

Prints 0 where every source of DATASET has a held-out split of its own. Else it prints the share for --val_ratio, and
after it `missing`, for --val_ratio_of, where some of the sources have one.
"""

from tandem.data.options import MISSING, DataOptions
from tandem.data.sources import hold_out
from tandem.errors import script_main

VAL_RATIO = "0.25"


def main(argv: list[str]) -> None:
    """Print the share for the data set that `argv` names.

    Raises:
        UserError: the data set cannot be read, or has several splits that could be the held-out one.
    """
    have = hold_out(DataOptions(argv[0]))
    print("0" if all(have) else f"{VAL_RATIO} {MISSING}" if any(have) else VAL_RATIO)


if __name__ == "__main__":
    script_main(main)
