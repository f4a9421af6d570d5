"""The data check as a stage: table, report, the pairs as they are trained, and a mended copy of the data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.data.balance import Balance
from tandem.data.formats import Row
from tandem.data.lint import HELD_OUT, LEVELS, Finding, lint, unread_columns, unreadable
from tandem.data.options import CheckOptions
from tandem.data.several import as_rows, to_row
from tandem.data.show import print_pair, show_pairs
from tandem.data.texts import render
from tandem.errors import UserError
from tandem.markdown_table import markdown_table
from tandem.options.model import TextOptions
from tandem.runs import write_atomic, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]

_FILES = {HELD_OUT: "test.jsonl"}  # the name that data.sources reads as a folder's held-out split
_PLACES = 3  # shown of a finding


def run_check(
    options: CheckOptions,
    text: TextOptions,
    splits: Mapping[str, Sequence[Row]],
    skipped: Sequence[str] = (),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    balances: Sequence[Balance] = (),
) -> None:
    """Print what was found, write the report and the mended data.

    `skipped` says of each row that the reader left out where it is and why, `balances` which columns were read. Without
    a tokenizer nothing is counted in tokens.

    Raises:
        UserError: a finding of the level `fail_on`; nothing to train on.
    """
    figures, findings = lint(splits, tokenizer, text)
    if skipped:
        findings.insert(0, unreadable(skipped, sum(map(len, splits.values()))))
    findings[:0] = unread_columns(balances)
    shown = [
        pair | {"split": name}
        for name, pairs in splits.items()
        for pair in (show_pairs(pairs[: options.show], tokenizer, text) if tokenizer else [])
    ]
    for pair in shown:
        print_pair(pair, Console(soft_wrap=True, highlight=False))
    print(to_markdown(figures), findings_to_markdown(findings), sep="\n\n")
    if options.report:
        report = {"splits": figures, "findings": [finding.to_json() for finding in findings], "shown": shown}
        report["columns"] = [balance.to_json() for balance in balances]
        write_json(Path(options.report), report)
    if options.fixed_dir:
        write_fixed(Path(options.fixed_dir), splits, mend(splits, findings, options.dropped))
    _stop_on(options, text, findings)


def _stop_on(options: CheckOptions, text: TextOptions, findings: Sequence[Finding]) -> None:
    for finding in findings:
        if finding.name == "answer_lost" and finding.count == finding.of:
            raise UserError(f"{finding.split}: every prompt alone fills --max_length {text.max_length}")
    if options.fail_on == "none":
        return
    counted = LEVELS[: LEVELS.index(options.fail_on) + 1]
    stopping = [finding for finding in findings if finding.level in counted]
    if stopping:
        told = "; ".join(f"{finding.name} ({finding}{_first(finding)})" for finding in stopping)
        raise UserError(f"the data check found what --fail_on {options.fail_on} stops on: {told}")


def _first(finding: Finding) -> str:
    """The place of a finding's first example, and what was found there."""
    if not finding.examples or "file" not in finding.examples[0]:
        return ""
    example = finding.examples[0]
    return f"; {example['file']} row {example['row']}: {example['found']}"


def to_markdown(figures: Mapping[str, Json]) -> str:
    """The counts as a Markdown table, a split a row."""
    header = ["split", "pairs", "prompts", "formats", "languages", "chosen longer", "bag of words"]
    header += ["median tokens (prompt, chosen, rejected)"]
    rows = []
    for name, split in figures.items():
        words = f"{split['bag_of_words']['value']:.2f}" if split["bag_of_words"] else "too few pairs"
        tokens = ", ".join(f"{value['median']:.0f}" for value in split.get("tokens", {}).values()) or "not counted"
        longer = f"{split['chosen_longer']:.2f}"
        rows.append(
            [
                name,
                split["pairs"],
                split["prompts"],
                _most(split["formats"]),
                _most(split["languages"]),
                longer,
                words,
                tokens,
            ]
        )
    return markdown_table(header, rows)


def _most(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in list(counts.items())[:3])


def findings_to_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table, the worst first."""
    rows = []
    for finding in sorted(findings, key=lambda finding: LEVELS.index(finding.level)):
        places = [
            f"{Path(example['file']).name} row {example['row']}" for example in finding.examples if "file" in example
        ]
        more = ["…"] if finding.count > _PLACES and places else []
        if finding.name == "template_other_end":
            places = [finding.examples[0]["found"]]
        share = f"{100 * finding.share:.2f}%"
        rows.append([finding.level, finding.name, share, finding, ", ".join(places[:_PLACES] + more)])
    return markdown_table(["level", "finding", "share", "what", "where"], rows) if rows else "The check found nothing."


def mend(
    splits: Mapping[str, Sequence[Row]], findings: Sequence[Finding], names: Sequence[str]
) -> dict[str, list[Row]]:
    """The splits without the pairs that the findings of these names are about."""
    dropped = {
        split: {row for finding in findings if finding.split == split and finding.name in names for row in finding.rows}
        for split in splits
    }
    return {
        split: [pair for row, pair in enumerate(pairs) if row not in dropped[split]] for split, pairs in splits.items()
    }


def write_fixed(folder: Path, splits: Mapping[str, Sequence[Row]], fixed: Mapping[str, Sequence[Row]]) -> None:
    """The mended splits as files that `data.sources` reads to the same pairs."""
    for split, pairs in fixed.items():
        file = folder / _FILES.get(split, f"{split}.jsonl")
        if len({isinstance(pair["prompt"], str) for pair in pairs}) > 1:  # a mixture; a file has one format
            pairs = [render(pair, use_chat_template=True) for pair in pairs]
        write_atomic(file, "".join(json.dumps(to_row(row)) + "\n" for row in as_rows(pairs)))
        print(f"{file}: {len(pairs)} of {len(splits[split])} pairs")
