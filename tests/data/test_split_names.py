from pathlib import PurePath

import pytest

from tandem.data.split_names import held_out_split, is_held_out, is_training, named, split_of, training_split

UF = ["train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("dpo_train.jsonl", "train"),
        ("Train.JSONL", "train"),
        ("dpoTrain.csv", "train"),
        ("train-part2.json.gz", "train"),
        ("train_en.jsonl", "train"),
        ("training/a.jsonl", "train"),
        ("test.jsonl", "test"),
        ("TEST.jsonl", "test"),
        ("my-test.jsonl", "test"),
        ("heldout.jsonl", "test"),
        ("held_out.jsonl", "test"),
        ("hold-out/a.jsonl", "test"),
        ("eval2.jsonl", "test"),
        ("validation.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("val_split.parquet", "validation"),
        ("harmless-base/test.jsonl.gz", "test"),
        ("data/train-00000-of-00002-ab12.parquet", "train"),
        ("train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("data/test_gen-00000-of-00001.parquet", "test_gen"),
        ("harmless-00003-of-00010.parquet", "harmless"),
        ("train_sft.jsonl", "train_sft"),
        ("test_prefs.jsonl", "test_prefs"),
        ("pairs.jsonl", None),
        ("latest.jsonl", None),
        ("contest.jsonl", None),
        ("developers.jsonl", None),
        ("retrained.jsonl", None),
        ("a.test.jsonl", None),
    ],
)
def test_what_a_name_says(path: str, split: str | None):
    assert split_of(PurePath(path)) == split


@pytest.mark.parametrize("path", ["train/test.jsonl", "train_test.jsonl", "validation/train.jsonl", "dev_train.csv"])
def test_a_name_that_says_both_is_refused(path: str):
    with pytest.raises(ValueError, match="names training and held-out data"):
        split_of(PurePath(path))


def test_kinds():
    assert [is_training(name) for name in UF] == [True] * 3 + [False] * 3
    assert [is_held_out(name) for name in UF] == [False] * 3 + [True] * 3
    assert not is_training("harmless") and not is_held_out("harmless") and not is_training("train_test")


def test_which_split_is_meant():
    assert training_split(UF) is None
    assert training_split(["train_prefs", "test_prefs"]) == "train_prefs"
    assert held_out_split(UF, "train_prefs") == "test_prefs"
    assert held_out_split(UF, "train") is None
    assert held_out_split(["train", "validation"], "train") == "validation"
    assert held_out_split(["train"], "train") is None
    assert held_out_split(["train_sft", "test_prefs"], "train_sft") is None
    assert named(["train", "validation"], "dev") == "validation"
    assert named(["train", "test"], "eval") == "test"
    assert named(["train", "eval"], "eval") == "eval"
    assert named(["train"], "valid") is None
    assert named(UF, "train") is None
