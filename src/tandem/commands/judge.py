"""Have a judge compare the answers of two models; the judge itself is tested on labelled pairs first."""

from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out
from tandem.judge.options import JudgeOptions
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    options, data = parse(argv, (JudgeOptions, DataOptions), prog="judge.py", description=__doc__)
    from tandem.judge.calibration import labelled_comparisons
    from tandem.judge.comparisons import load_comparisons
    from tandem.judge.run import judge

    pairs = load_held_out(data)
    comparisons = load_comparisons(options, pairs)
    labelled = labelled_comparisons(pairs, options.calibration_pairs, options.seed)
    summary = judge(options, comparisons, labelled)
    if not options.dry_run:
        save(options.folder / "judge.yaml", options, data)
    print(summary.get("conclusion") or summary)
