"""Rank several models by the verdicts of one or more judges on every pair of models."""

from pathlib import Path

from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.judge.rank_options import RankOptions
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    options, data = parse(argv, (RankOptions, DataOptions), prog="rank.py", description=__doc__)
    from tandem.judge.calibration import labelled_comparisons
    from tandem.judge.ranking import all_pairs, rank
    from tandem.report.ranking import table, write_ranking

    comparisons = all_pairs(options)
    labelled = labelled_comparisons(load_held_out(data), options.calibration_pairs, options.seed)
    result = rank(options, comparisons, labelled)
    if options.dry_run:
        print(result)
        return
    save(Path(options.output_dir) / "rank.yaml", options, data)
    write_ranking(Path(options.output_dir) / "ranking.html", result)
    print(table(result))
    print(result["conclusion"])
