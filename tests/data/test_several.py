"""Several rejected answers in a row, and the columns `weight` and `margin`: what is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.options import DataOptions, SFTDataOptions
from tandem.data.several import as_rows, first_rows, to_row, trained_by
from tandem.data.sources import load_held_out, load_pairs, load_splits, load_training
from tandem.errors import UserError
from tests import tiny


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


HH = "\n\nHuman: hi\n\nAssistant:"
SHAPES: dict[str, dict[str, Any]] = {
    "prompt_pair": {"prompt": "q", "chosen": "yes", "rejected": ["no", "never"]},
    "alpaca": {"instruction": "q", "input": "", "chosen": "yes", "rejected": ["no", "never"]},
    "orca": {"question": "q", "chosen": "yes", "rejected": ["no", "never"]},
    "hh": {"chosen": f"{HH} yes", "rejected": [f"{HH} no", f"{HH} never"]},
    "messages": {"prompt": user("q"), "chosen": says("yes"), "rejected": [says("no"), says("never")]},
    "messages, prompt repeated": {
        "chosen": user("q") + says("yes"), "rejected": [user("q") + says("no"), user("q") + says("never")],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": [{"from": "gpt", "value": "yes"}],
        "rejected": [[{"from": "gpt", "value": "no"}], [{"from": "gpt", "value": "never"}]],
    },
}  # fmt: skip


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    path = tiny.save_pairs(tmp_path / "rows.jsonl", list(rows))
    return load_pairs(DataOptions(dataset_name=str(path), **options), "train")


def text_of(answer: Any) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_list_of_rejected_answers_is_pairs_of_one_group(shape: str, tmp_path: Path):
    row = SHAPES[shape]
    single = row | {"rejected": row["rejected"][0]}
    pairs = read(tmp_path, row, single)
    assert [text_of(pair["rejected"]) for pair in pairs] == ["no", "never", "no"]
    assert [text_of(pair["chosen"]) for pair in pairs] == ["yes"] * 3
    assert [pair["row"] for pair in pairs] == [1, 1, 2]
    assert pairs[0]["group"] == pairs[1]["group"] and "group" not in pairs[2]
    assert pairs[0]["pair_id"] == pairs[2]["pair_id"] != pairs[1]["pair_id"]
    assert [len(each) for each in as_rows(pairs)] == [2, 1]
    assert [pair["group"] for pair in trained_by(pairs)] == [0, 0, 1]
    alone = read(tmp_path, single)  # a list of one is no group
    assert [{**pair, "row": 1} for pair in read(tmp_path, row | {"rejected": row["rejected"][:1]})] == alone


def test_weights_and_margins(tmp_path: Path):
    several = SHAPES["prompt_pair"]
    pairs = read(
        tmp_path,
        several | {"weight": [2, "0.5"], "margin": 1.5},
        several | {"rejected": "no", "weight": 0, "margin": -1},
    )
    assert [(pair["weight"], pair["margin"]) for pair in pairs] == [(2, 1.5), (0.5, 1.5), (0, -1)]
    assert [pair["weight"] for pair in trained_by(pairs)] == [2, 0.5, 0]
    # What a mended copy of the data is written with is read again
    again = read(tmp_path, *(to_row(row) for row in as_rows(pairs)))
    assert again == pairs
    # SFT learns the chosen answer once, and says that it does not read the numbers
    examples = load_pairs(SFTDataOptions(dataset_name=str(tmp_path / "rows.jsonl")), "train")
    assert len(examples) == 2 and not any({"weight", "group"} & set(each) for each in examples)


def test_what_is_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tiny.save_pairs(tmp_path / "test.jsonl", [SHAPES["prompt_pair"] | {"weight": 2.0}])
    load_pairs(SFTDataOptions(dataset_name=str(path)), "train")
    assert "NOT read: weight: a number in 1 of 1 rows" in capsys.readouterr().err
    pairs = load_held_out(DataOptions(dataset_name=str(path)))
    assert "weight of pairs are for training: here each pair counts once" in capsys.readouterr().err
    assert len(pairs) == 2
    ignored = load_pairs(DataOptions(dataset_name=str(path), ignore_columns=["weight"]), "train")
    assert "weight" not in ignored[0] and "left out by --ignore_columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rejected": ["no", says("x")]}, "row 2: field 'rejected': several answers must all be texts or all lists"),
        ({"rejected": ["no", ""]}, "row 2: field 'rejected', answer 2: the completion is empty"),
        ({"rejected": ["no", None]}, "row 2: field 'rejected': several answers must all be texts"),
        ({"weight": [1.0]}, "row 2: field 'weight': has 1 values for 2 answers in 'rejected'"),
        ({"weight": -1}, "row 2: field 'weight': must be a number of 0 or more, which pairs are trained by, not -1"),
        ({"weight": "high"}, "field 'weight': must be a number of 0 or more, .*not text; .*--ignore_columns weight"),
        ({"weight": None}, "row 2: field 'weight': is missing or empty, and other rows have it"),
        ({"margin": [1, "a"]}, "row 2: field 'margin': must be a number, .*not text"),
        ({"margin": float("inf")}, "row 2: field 'margin': must be a number"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_row_is_named(change: dict[str, Any], told: str, tmp_path: Path):
    good = SHAPES["prompt_pair"] | {"weight": 1.0, "margin": 0.5}
    with pytest.raises(UserError, match=told):
        read(tmp_path, good, good | change)


def test_groups_stay_whole_in_a_mixture_and_a_limit(tmp_path: Path):
    rows = [SHAPES["prompt_pair"] | {"prompt": f"q{i}"} for i in range(9)]
    single = [{"prompt": f"s{i}", "chosen": "a", "rejected": "b"} for i in range(6)]
    tiny.save_pairs(tmp_path / "groups.jsonl", rows)
    tiny.save_pairs(tmp_path / "single.jsonl", single)
    mixture = tmp_path / "mixture.yaml"
    sources: list[dict[str, Any]] = [{"dataset_name": "groups.jsonl"}, {"dataset_name": "single.jsonl"}]
    mixture.write_text(json.dumps(sources))
    pairs = load_training(DataOptions(dataset_name=str(mixture)))
    assert sorted(map(len, as_rows(pairs))) == [1] * 6 + [2] * 6
    assert len(first_rows(pairs, 5)) == sum(len(row) for row in as_rows(pairs)[:5])
    train, held_out = load_splits(DataOptions(dataset_name=str(mixture), val_ratio=0.4))
    assert {len(row) for row in as_rows(train)} == {len(row) for row in as_rows(held_out)} == {1, 2}
