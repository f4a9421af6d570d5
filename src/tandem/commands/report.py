"""Write report.html, the one page on a run that a person opens at its end."""

from tandem.options.parsing import parse
from tandem.report.page import ReportOptions, write_report


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (ReportOptions,), prog="report.py", description=__doc__)
    print(write_report(options))
