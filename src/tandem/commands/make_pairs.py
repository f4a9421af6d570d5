"""Make preference pairs of scored answers."""

from pathlib import Path

from tandem.options.parsing import parse, save
from tandem.rounds.options import PairOptions
from tandem.rounds.records import check_there


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (PairOptions,), prog="make_pairs.py", description=__doc__)
    check_there(options.scores)
    from tandem.rounds.pairs import make_pairs, to_markdown

    print(to_markdown(make_pairs(options)))
    save(Path(options.output_dir) / "make_pairs.yaml", options)
