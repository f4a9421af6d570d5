"""Pairs of a data set, without those on held-out prompts, for the rounds to mix in.

    python -m tandem.rounds.offline PAIRS HELD_OUT_PROMPTS OUT

A pipeline may take its prompts (PROMPTS) and such pairs (OFFLINE_PAIRS) from the same data set.
"""

import json
from pathlib import Path

from tandem.data.formats import as_messages, prompt_id
from tandem.data.options import DataOptions
from tandem.data.several import as_rows, to_row
from tandem.data.sources import load_training
from tandem.errors import UserError, script_main
from tandem.rounds.records import read_prompt_ids
from tandem.runs import write_atomic


def without_held_out(pairs: str, held_out: Path, out: Path) -> str:
    """Write the pairs whose prompts are not held out as JSON lines; returns a line on how many were left out.

    Raises:
        UserError: a file cannot be read, or nothing is left.
    """
    shut = read_prompt_ids(held_out)
    rows = load_training(DataOptions(dataset_name=pairs))
    kept = [row for row in rows if prompt_id(as_messages(row["prompt"])) not in shut]
    if not kept:
        raise UserError(f"OFFLINE_PAIRS {pairs}: all of its prompts are held out")
    lines = (json.dumps(to_row(row)) + "\n" for row in as_rows(kept))
    write_atomic(out, "".join(lines))
    return f"{len(kept)} pairs of {pairs}; {len(rows) - len(kept)} left out, whose prompts are held out"


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise UserError("usage: python -m tandem.rounds.offline PAIRS HELD_OUT_PROMPTS OUT")
    print(without_held_out(argv[0], Path(argv[1]), Path(argv[2])))


if __name__ == "__main__":
    script_main(main)
