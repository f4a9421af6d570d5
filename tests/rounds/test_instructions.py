from pathlib import Path

import pytest

from tandem.data.options import DataOptions
from tandem.rounds.instructions import CONSTRAINTS, HELD_OUT, kept, rows, share, success, write
from tandem.rounds.prompts import held_out_prompts, training_prompts


@pytest.mark.parametrize(
    ("name", "value", "right", "wrong"),
    [
        ("lower_case", None, "all is well.", "All is well."),
        ("no_comma", None, "yes and no", "yes, no"),
        ("begin_with", "Well", "well, this is it", "Wellness is it"),
        ("at_most_words", 3, "one two-fold don't", "one two three four"),
        ("one_sentence", None, "It is 3.5 miles.", "It is. It was."),
        ("end_with_mark", None, "Go! ", "Go."),
    ],
)
def test_each_constraint(name: str, value: object, right: str, wrong: str):
    row = {"constraints": {name: value}}
    assert list(kept(right, row)) == [True]
    assert list(kept(wrong, row)) == [False]
    assert list(kept("  ", row)) == [False]


def test_success_is_all_of_them():
    row = {"constraints": {"no_comma": None, "end_with_mark": None}}
    assert success([], "Go!", row) == 1
    assert success([], "Go, go!", row) == 0
    assert [share([], text, row) for text in ("Go!", "Go, go!", "Go, go", "")] == [1, 0.5, 0, 0]


def test_held_out_prompts_have_other_combinations(tmp_path: Path):
    write(tmp_path)
    options = DataOptions(dataset_name=str(tmp_path))
    train, held_out = training_prompts(options), held_out_prompts(options)
    assert len(held_out) == HELD_OUT >= 200
    pairs = [{tuple(prompt.row["constraints"]) for prompt in part} for part in (train, held_out)]
    assert not pairs[0] & pairs[1]
    assert [len(part) for part in pairs] == [9 + 6, 6]  # of fifteen pairs; training has single constraints as well
    for part in pairs:
        assert {name for pair in part for name in pair} == set(CONSTRAINTS)
    assert rows(5, held_out=True) == rows(5, held_out=True)
