"""Faults put into Anthropic's harmless-base data, which must all be found, while the clean file is left alone."""

import gzip
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tandem.data.lint import HELD_OUT, TRAIN, lint
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.options.model import TextOptions
from tests import tiny

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_base_test_part1.jsonl.gz"
HELD = 150  # rows at the end of the file that are held out
MAX_LENGTH = 8_000  # tokens, which are bytes here; the longest clean pair has 5,000

# Findings that any of the planted faults may come under
KINDS = {
    "identical": ("identical",),
    "duplicated": ("duplicates", "near_duplicates"),
    "turned round": ("contradictory",),
    "too long": ("answer_cut", "answer_lost", "difference_cut"),
    "leaked": ("leaked_prompts", "near_leaked_prompts"),
}


@dataclass
class Planted:
    """Lines of a training file, and which of them (counted from 0) have which fault."""

    rows: list[dict[str, str]]
    faults: dict[str, set[int]] = field(default_factory=dict)

    def add(self, fault: str, row: dict[str, str]) -> None:
        self.rows.append(row)
        self.faults.setdefault(fault, set()).add(len(self.rows) - 1)

    def change(self, fault: str, index: int, row: dict[str, str]) -> None:
        self.rows[index] = row
        self.faults.setdefault(fault, set()).add(index)


def plant(train: list[dict[str, str]], leaked: dict[str, str], seed: int) -> Planted:
    """1% duplicates, 1% again with chosen and rejected swapped, 2% identical, 5% too long, one leaked prompt."""
    noise = random.Random(seed)
    planted = Planted([dict(row) for row in train])
    percent = len(train) // 100
    victims = noise.sample(range(len(train)), 9 * percent)
    groups = [
        victims[:percent],
        victims[percent : 2 * percent],
        victims[2 * percent : 4 * percent],
        victims[4 * percent :],
    ]
    copies, swaps, identical, long = groups
    for index in identical:
        planted.change("identical", index, {side: train[index]["chosen"] for side in ("chosen", "rejected")})
    for index in long:
        # To the end of the same answers, so that only what is cut differs from the clean row
        more = " ".join(noise.choices(tiny.WORDS, k=2500))
        planted.change("too long", index, {side: f"{train[index][side]} {more}" for side in ("chosen", "rejected")})
    for index in copies:
        planted.add("duplicated", train[index])
    for index in swaps:
        planted.add("turned round", {"chosen": train[index]["rejected"], "rejected": train[index]["chosen"]})
        planted.faults["turned round"].add(index)  # its origin contradicts it as much
    prompt = leaked["chosen"].rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"
    planted.add("leaked", {"chosen": f"{prompt} Let me think about that.", "rejected": f"{prompt} I would rather not."})
    return planted


def flagged(folder: Path, train: list[dict[str, str]], held_out: list[dict[str, str]]) -> dict[str, set[int]]:
    """Fault → lines of the training file that a finding of its kinds names, read and checked as the script does."""
    for name, rows in {"train": train, "test": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(str(folder), max_bad_rows=100)
    splits = {TRAIN: load_pairs(options, "train"), HELD_OUT: load_pairs(options, "test")}
    _, findings = lint(splits, tiny.tokenizer(), TextOptions(max_length=MAX_LENGTH))
    return {
        fault: {
            splits[TRAIN][row]["row"] - 1
            for finding in findings
            if finding.split == TRAIN and finding.name in names
            for row in finding.rows
        }
        for fault, names in KINDS.items()
    }


@pytest.fixture(scope="module")
def clean() -> list[dict[str, str]]:
    if not HH.exists():
        pytest.skip(f"{HH} is not here")
    with gzip.open(HH, "rt") as file:
        return [json.loads(line) for line in file]


def test_the_clean_file_raises_no_false_alarm_worth_speaking_of(clean: list[dict[str, str]], tmp_path: Path):
    """A false alarm: a row of the clean file under any planted kind, whether or not the file has that fault itself."""
    train, held_out = clean[:-HELD], clean[-HELD:]
    found = flagged(tmp_path, train, held_out)
    print({fault: sorted(rows) for fault, rows in found.items()})
    assert len(set().union(*found.values())) / len(train) <= 0.005


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_faults_are_all_found_and_nothing_else(clean: list[dict[str, str]], tmp_path: Path, seed: int):
    train, held_out = clean[:-HELD], clean[-HELD:]
    planted = plant(train, held_out[seed], seed)
    found = flagged(tmp_path, planted.rows, held_out)
    print({fault: (len(rows), len(rows & found[fault])) for fault, rows in planted.faults.items()})
    assert {fault: len(rows) for fault, rows in planted.faults.items()} == {
        "identical": 26, "too long": 65, "duplicated": 13, "turned round": 26, "leaked": 1
    }  # fmt: skip
    for fault, rows in planted.faults.items():
        assert rows <= found[fault], fault
    false = [(fault, row) for fault, rows in found.items() for row in rows - planted.faults[fault]]
    print(false)
    assert len({row for _, row in false}) / len(planted.rows) <= 0.005
