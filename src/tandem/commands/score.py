"""Score drawn answers by reward models, a judge or a function of your own."""

from pathlib import Path

from tandem.options.parsing import parse, save
from tandem.rounds.options import ScoreOptions


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (ScoreOptions,), prog="score.py", description=__doc__)
    from tandem.rounds.score import score, to_markdown

    print(to_markdown(score(options)))
    save(Path(options.output_dir) / "score.yaml", options)
