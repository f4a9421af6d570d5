"""Measure the rounds of a run on their held-out answers, and name the best."""

from tandem.options.parsing import parse
from tandem.rounds.options import RoundsOptions


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (RoundsOptions,), prog="rounds.py", description=__doc__)
    from tandem.rounds.measure import measure, to_markdown

    print(to_markdown(measure(options)))
