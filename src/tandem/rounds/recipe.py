"""A recipe's dpo.yaml for the rounds after the first, which train the adapter of the round before further.

python -m tandem.rounds.recipe dpo.yaml    prints it without the options that make a new adapter
"""

import dataclasses

from tandem.errors import UserError, script_main
from tandem.options.model import LoraOptions
from tandem.options.yaml_text import read_yaml, to_yaml


def of_later_rounds(path: str) -> str:
    """The YAML at `path` without `use_peft` and the options that need it.

    Raises:
        UserError: it cannot be read, or asks for 4-bit weights, on which later rounds cannot train an adapter further.
    """
    values = read_yaml(path)
    if str(values.get("load_in_4bit")).lower() == "true":
        raise UserError(f"--config {path}: load_in_4bit: an adapter on 4 bits cannot be trained further: set ROUNDS=1")
    of_adapters = {field.name for field in dataclasses.fields(LoraOptions)} - {"load_in_4bit"}
    return to_yaml({name: value for name, value in values.items() if name not in of_adapters})


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("usage: python -m tandem.rounds.recipe dpo.yaml")
    print(of_later_rounds(argv[0]), end="")


if __name__ == "__main__":
    script_main(main)
