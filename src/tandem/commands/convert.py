"""Turn another program's recipe into a config of Tandem, with a comment for each key: convert.py RECIPE.yaml"""

import sys
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.options.convert import ConvertOptions, convert_recipe, without_idle
from tandem.options.fields import options_of
from tandem.options.parsing import faults_of, parse
from tandem.runs import write_atomic
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, check, classes


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        argv = ["--recipe", *argv]
    (options,) = parse(argv, (ConvertOptions,), prog="convert.py", description=__doc__)
    run = SFTOptionSet if options.stage == "sft" else DPOOptionSet
    converted = convert_recipe(options.recipe, {each.name: each for cls in classes(run) for each in options_of(cls)})
    if not converted.values:
        raise UserError(f"--recipe {options.recipe}: none of its keys is known")

    def faults(values: dict[str, Any]) -> list[str]:
        return faults_of(values, classes(run), check)

    converted = without_idle(converted, faults)
    if options.output:
        write_atomic(Path(options.output), converted.text)
    else:
        print(converted.text, end="")
    told = [f"not taken: {key}" for key in converted.open]
    told += [f"to settle: {fault}" for fault in faults(converted.values)]
    for line in told:
        print(f"note: {line}", file=sys.stderr)
