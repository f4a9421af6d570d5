"""Write report.html, the page to open when a run has ended."""

from tandem.options.parsing import parse
from tandem.report.page import ReportOptions, write_report


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (ReportOptions,), prog="report.py", description=__doc__)
    print(write_report(options))
