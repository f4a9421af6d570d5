import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.lint import lint
from tandem.data.options import DataOptions
from tandem.data.scores import number
from tandem.data.sources import load_pairs, load_splits
from tandem.errors import UserError
from tandem.options.model import TextOptions


def row(index: int, chosen: Any, rejected: Any, names: tuple[str, str] = ("score_chosen", "score_rejected")) -> Any:
    pair = {"prompt": f"q{index}", "chosen": f"good {index}", "rejected": f"bad {index}"}
    return pair | {names[0]: chosen, names[1]: rejected}


def options(folder: Path, rows: list[Any], **given: Any) -> DataOptions:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return DataOptions(str(folder / "pairs.jsonl"), **given)


ROWS = [row(0, 8.5, 6.0), row(1, 5, 5), row(2, 4.0, 7.5), row(3, "7.0", "6.5"), row(4, 6.0, 5.5)]


def test_pairs_that_are_scored_no_better_are_found(tmp_path: Path):
    pairs = load_pairs(options(tmp_path, ROWS), "train")
    found = {each.name: each for each in lint({"train": pairs}, None, TextOptions())[1]}["score_order"]
    assert list(found.rows) == [1, 2]
    assert [example["found"] for example in found.examples] == ["chosen 5, rejected 5", "chosen 4, rejected 7.5"]


@pytest.mark.parametrize(("margin", "kept"), [(0, [0, 3, 4]), (0.5, [0]), (2, [0])])
def test_min_score_margin(tmp_path: Path, capsys: pytest.CaptureFixture[str], margin: float, kept: list[int]):
    pairs = load_pairs(options(tmp_path, ROWS, min_score_margin=margin), "train")
    assert [pair["prompt"] for pair in pairs] == [f"q{index}" for index in kept]
    assert [pair["row"] for pair in pairs] == [index + 1 for index in kept]
    told = f"pairs.jsonl (train): {5 - len(kept)} of 5 pairs are left out by --min_score_margin {margin:g}\n"
    assert told in capsys.readouterr().err


def test_the_held_out_pairs_are_chosen_alike(tmp_path: Path):
    train, held_out = load_splits(options(tmp_path, ROWS, min_score_margin=0, val_ratio=0.4))
    assert {pair["prompt"] for pair in train + held_out} == {"q0", "q3", "q4"}


def test_no_pair_is_left(tmp_path: Path):
    with pytest.raises(UserError, match=r"--min_score_margin 5: no pair of .* has its scores that far apart"):
        load_pairs(options(tmp_path, ROWS, min_score_margin=5), "train")


@pytest.mark.parametrize(
    "names",
    [("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"), ("chosen_score", "rejected_score")],
)
def test_other_names_of_scores(tmp_path: Path, names: tuple[str, str]):
    pairs = load_pairs(options(tmp_path, [row(0, 5, 4, names), row(1, 4, 5, names)], min_score_margin=0), "train")
    assert [pair["prompt"] for pair in pairs] == ["q0"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "row 2: has no scores: --min_score_margin needs numbers"),
        (row(1, None, 3), "row 2: field 'score_chosen': is null: --min_score_margin needs"),
        (row(1, "high", 3), "row 2: field 'score_chosen': is text: --min_score_margin needs"),
    ],
)
def test_a_row_without_scores(tmp_path: Path, bad: Any, said: str):
    with pytest.raises(UserError) as error:
        load_pairs(options(tmp_path, [ROWS[0], bad], min_score_margin=0), "train")
    assert said in str(error.value)
    assert len(load_pairs(options(tmp_path, [ROWS[0], bad], min_score_margin=0, max_bad_rows=1), "train")) == 1
    assert len(load_pairs(options(tmp_path, [ROWS[0], bad]), "train")) == 2


def test_what_is_a_number():
    assert [number(value) for value in (1, 2.5, "3.5", " 4 ", "-1")] == [1, 2.5, 3.5, 4, -1]
    assert [number(value) for value in (None, True, "N/A", "nan", float("inf"), [1], 10**400)] == [None] * 7
