"""Folders of data: what is trained on and what is held out, as the Hub would read them; nothing held out is trained."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out, load_pairs, load_splits, load_training, may_hold_out
from tandem.errors import UserError


def rows(name: str, count: int = 2) -> list[dict[str, str]]:
    return [{"prompt": f"{name} {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def write(path: Path, name: str | None = None, count: int = 2) -> None:
    """Rows that are asked after `name`, or the file's own stem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows(name or path.name.split(".")[0], count)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content))


def asked(pairs: list[dict[str, Any]]) -> set[str]:
    return {pair["prompt"].split()[0] for pair in pairs}


def splits(folder: Path, **options: Any) -> tuple[set[str], set[str]]:
    data = DataOptions(str(folder), **options)
    train, held_out = load_splits(data)
    assert load_training(data) == train
    assert may_hold_out(data) == bool(held_out)
    if held_out:
        assert load_held_out(data) == held_out
    return asked(train), asked(held_out)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load_splits(DataOptions(str(folder), **options))
    return str(error.value).removeprefix(f"--dataset_name {folder}: ")


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (("train.jsonl", "test.jsonl"), {"train"}, {"test"}),
        (("dpo_train.jsonl", "validation.jsonl"), {"dpo_train"}, {"validation"}),
        (("dpo_train.jsonl", "dpo_dev.jsonl"), {"dpo_train"}, {"dpo_dev"}),
        (("my.jsonl", "more.JSONL"), {"my", "more"}, set()),
        (("train-1.jsonl", "train-2.ndjson", "eval.jsonl"), {"train-1", "train-2"}, {"eval"}),
        (("train/a.jsonl", "test/b.jsonl"), {"a"}, {"b"}),
        (("base/train.jsonl", "online/train_more.jsonl", "base/test.jsonl"), {"train", "train_more"}, {"test"}),
        (("train_prefs.jsonl", "test_prefs.jsonl"), {"train_prefs"}, {"test_prefs"}),
        (("train.jsonl", ".cache/test.jsonl", "__pycache__/x.json"), {"train"}, set()),
        (("train.jsonl", "validation.jsonl", "test.jsonl"), {"train"}, {"test"}),
    ],
)
def test_file_names(tmp_path: Path, names: tuple[str, ...], train: set[str], held_out: set[str]):
    for name in names:
        write(tmp_path / name)
    assert splits(tmp_path) == (train, held_out)


def test_a_test_file_beside_others_is_not_trained_on(tmp_path: Path):
    write(tmp_path / "pairs.jsonl")
    write(tmp_path / "test.jsonl")
    assert refusal(tmp_path) == (
        "pairs.jsonl is in no split, as other files are: name it train…, test…, eval…, valid…, dev…, or move it away"
    )
    (tmp_path / "pairs.jsonl").unlink()
    assert refusal(tmp_path) == (
        "test.jsonl is held out, and there is nothing to train on: name a file train…, or give --dataset_name the "
        "file itself"
    )
    assert asked(load_pairs(DataOptions(str(tmp_path / "test.jsonl")), "train")) == {"test"}


def test_a_file_that_names_both_is_refused(tmp_path: Path):
    write(tmp_path / "train" / "test.jsonl")
    assert refusal(tmp_path) == "train/test.jsonl names training and held-out data: rename it"


def test_the_other_folders_of_a_snapshot_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As Anthropic/hh-rlhf lies on the Hub."""
    for name in ("harmless-base/train.jsonl", "harmless-base/test.jsonl", "red-team-attempts/red_team_attempts.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# HH\n")
    assert splits(tmp_path) == ({"train"}, {"test"})
    told = f"{tmp_path}: red-team-attempts/red_team_attempts.jsonl is in no split and is not read\n"
    assert capsys.readouterr().err.count(told) == 1


STAGES = ("prefs", "sft", "gen")


@pytest.fixture(params=["hub", "flat", "names"])
def ultrafeedback(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """ultrafeedback_binarized's files: the same prompts for each stage of training."""
    for split in ("train", "test"):
        for stage in STAGES:
            name = f"{split}_{stage}"
            if request.param == "names":
                write(tmp_path / f"{name}.jsonl", name)
            else:
                folder = tmp_path / "data" if request.param == "hub" else tmp_path
                write(folder / f"{name}-00000-of-00001.parquet", name)
    return tmp_path


def test_splits_for_several_stages_are_named(ultrafeedback: Path, capsys: pytest.CaptureFixture[str]):
    assert refusal(ultrafeedback) == (
        "no split train (has train_gen, train_prefs, train_sft, test_gen, test_prefs, test_sft); "
        "name one with --dataset_train_split"
    )
    assert splits(ultrafeedback, dataset_train_split="train_prefs") == ({"train_prefs"}, {"test_prefs"})
    assert f"{ultrafeedback} has no split test: using test_prefs\n" in capsys.readouterr().err
    assert splits(ultrafeedback, dataset_train_split="train_sft[:1]", dataset_test_split="test_gen") == (
        {"train_sft"},
        {"test_gen"},
    )


def test_a_split_that_was_named_and_is_not_there(tmp_path: Path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test_a-00000-of-00001.parquet")
    write(tmp_path / "test_b-00000-of-00001.parquet")
    assert refusal(tmp_path) == "no split test (has train, test_a, test_b); name one with --dataset_test_split"
    assert refusal(tmp_path, dataset_test_split="mine").startswith("no split mine (has train, test_a")
    assert refusal(tmp_path, dataset_train_split="trian").startswith("no split trian (has train, test_a")
    assert splits(tmp_path, dataset_test_split="test_b") == ({"train"}, {"test_b-00000-of-00001"})


def test_a_hub_snapshot(tmp_path: Path):
    for number in range(2):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", f"train{number}")
    write(tmp_path / "data" / "validation-00000-of-00001-1a2b.parquet", "validation")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert splits(tmp_path) == ({"train0", "train1"}, {"validation"})


@pytest.mark.parametrize("whole", [True, False])
def test_what_save_to_disk_wrote(tmp_path: Path, whole: bool):
    train = datasets.Dataset.from_list(rows("train", 6)).select([0, 2, 4])  # an index table beside the rows
    if whole:
        datasets.DatasetDict({"train": train, "test": datasets.Dataset.from_list(rows("test"))}).save_to_disk(
            str(tmp_path / "saved")
        )
    else:
        train.save_to_disk(str(tmp_path / "saved"))
    options = DataOptions(str(tmp_path / "saved"))
    loaded, held_out = load_splits(options)
    assert [pair["prompt"] for pair in loaded] == ["train 0?", "train 2?", "train 4?"]
    assert [pair["row"] for pair in loaded] == [1, 2, 3]
    assert asked(held_out) == ({"test"} if whole else set())
    if whole:
        assert len(load_pairs(options, "train[:1]")) == 1


def test_a_damaged_saved_folder(tmp_path: Path):
    datasets.Dataset.from_list(rows("train")).save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(UserError, match=r"saved: cannot be read as a folder of save_to_disk"):
        load_training(DataOptions(str(tmp_path / "saved")))


def card(folder: Path, configs: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}---\n# A data set\n")


DEFAULT = """\
- config_name: default
  data_files:
  - split: train
    path: parts/good-*.jsonl
  - split: test
    path: [parts/checked.jsonl]
"""


def test_a_card_says_which_files_are_which(tmp_path: Path):
    """The Hub reads the card, whatever the files are called."""
    for name in ("good-a", "good-b", "checked", "left-out"):
        write(tmp_path / "parts" / f"{name}.jsonl")
    card(tmp_path, DEFAULT)
    assert splits(tmp_path) == ({"good-a", "good-b"}, {"checked"})


def test_a_card_that_says_nothing_of_files(tmp_path: Path):
    write(tmp_path / "train.jsonl")
    for head in ("---\ntags: [\n---\n", "---\n{{ card_data }}\n---\n", "# A data set\n", "", "---\nconfigs:\n---\n"):
        (tmp_path / "README.md").write_text(head)
        assert splits(tmp_path) == ({"train"}, set())


def test_configurations_of_a_card(tmp_path: Path):
    for name in ("en/train.jsonl", "en/test.jsonl", "fr/all.jsonl"):
        write(tmp_path / name, name.replace("/", "-"))
    card(
        tmp_path,
        "- config_name: english\n  data_dir: en\n- config_name: french\n  data_files: fr/*.jsonl\n",
    )
    assert refusal(tmp_path) == "name one of its configurations with --dataset_config: english, french"
    assert refusal(tmp_path, dataset_config="german") == "README.md has no configuration german (has english, french)"
    assert splits(tmp_path, dataset_config="english") == ({"en-train.jsonl"}, {"en-test.jsonl"})
    assert splits(tmp_path, dataset_config="french") == ({"fr-all.jsonl"}, set())
    card(tmp_path, "- config_name: 2023\n  data_dir: en\n- config_name: 2024\n  data_files: fr\n  default: true\n")
    assert splits(tmp_path) == ({"fr-all.jsonl"}, set())


def test_a_card_reads_as_the_hub_does(tmp_path: Path):
    """datasets itself, on the same folder."""
    for name in ("a/one-train.jsonl", "a/two.jsonl", "b/held.jsonl"):
        write(tmp_path / name)
    card(tmp_path, "- config_name: x\n  data_files:\n  - split: train\n    path: a/**\n  - split: dev\n    path: b/*\n")
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    assert set(theirs) == {"train", "dev"}
    train, held_out = load_splits(DataOptions(str(tmp_path)))
    assert [pair["prompt"] for pair in train] == theirs["train"]["prompt"]
    assert [pair["prompt"] for pair in held_out] == theirs["dev"]["prompt"]


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ("- config_name: x\n  data_files: ../*.jsonl\n", "'../*.jsonl' of x is no path inside the folder"),
        ("- config_name: x\n  data_files: /etc/*\n", "'/etc/*' of x is no path inside the folder"),
        ("- config_name: x\n  data_dir: ..\n", "'..' of x is no path inside the folder"),
        ("- config_name: x\n  data_files: {}\n", "data_files of x is empty"),
        ("- config_name: x\n  data_files: {a: {b: c}}\n", "data_files of x must be paths"),
        ("- config_name: x\n  data_files:\n  - split: train\n", "data_files of x must be paths"),
        ("  a: b\n", "configs must be a list of objects with config_name"),
        ("- [\n", "its head cannot be read"),
        ("- config_name: x\n  data_files: '*.txt'\n", "a.txt, which its README.md names, is not one of .json"),
        ("- config_name: x\n  data_files: gone.jsonl\n", "no file matches what its README.md says of the split train"),
    ],
)
def test_a_card_that_cannot_be_followed(tmp_path: Path, configs: str, said: str):
    (tmp_path / "a.txt").write_text("text")
    write(tmp_path / "train.jsonl")
    card(tmp_path, configs)
    assert said in refusal(tmp_path)


def test_a_configuration_without_a_card(tmp_path: Path):
    write(tmp_path / "train.jsonl")
    assert refusal(tmp_path, dataset_config="x").startswith("--dataset_config has no effect")
    assert refusal(tmp_path / "train.jsonl", dataset_config="x").startswith("--dataset_config has no effect")


def test_an_empty_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).startswith("the folder has no .json, .jsonl, .csv")
