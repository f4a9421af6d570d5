"""Data sets in the shape that the Hub has them: their splits, the recipes on them, and what the pipeline holds out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tandem.data.mixtures import sources_of
from tandem.data.options import DataOptions
from tandem.data.sources import all_hold_out
from tandem.errors import UserError
from tandem.launch import held_out
from tests import tiny
from tests.stub_hub import StubHub, hh_rlhf

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipelines" / "recipes"


def user(text: str) -> dict[str, str]:
    return {"content": text, "role": "user"}


def assistant(text: str) -> dict[str, str]:
    return {"content": text, "role": "assistant"}


def ultrafeedback(split: str, index: int) -> dict[str, Any]:
    question, good, bad = f"{split} {index}?", f"Good {index}.", f"Bad {index}."
    return {
        "prompt": question,
        "prompt_id": f"{index:064}",
        "chosen": [user(question), assistant(good)],
        "rejected": [user(question), assistant(bad)],
        "messages": [user(question), assistant(good)],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }


def tulu(index: int) -> dict[str, Any]:
    question = f"tulu {index}?"
    return {
        "id": f"a_{index}",
        "prompt": question,
        "chosen": [user(question), assistant(f"Good {index}.")],
        "rejected": [user(question), assistant(f"Bad {index}.")],
        "source": "wildchat",
    }


def orca(index: int) -> dict[str, Any]:
    system = "Answer briefly." if index % 2 else ""
    return {"system": system, "question": f"orca {index}?", "chosen": f"Good {index}.", "rejected": f"Bad {index}."}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


def card(splits: list[str]) -> bytes:
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n".encode()


SPLITS = ["train_prefs", "train_sft", "test_prefs", "test_sft", "train_gen", "test_gen"]
REPOSITORIES = {
    "datasets/HuggingFaceH4/ultrafeedback_binarized": {
        f"data/{split}-00000-of-00001.parquet": parquet([ultrafeedback(split, index) for index in range(3)])
        for split in SPLITS
    }
    | {"README.md": card(SPLITS)},
    "datasets/allenai/llama-3.1-tulu-3-8b-preference-mixture": {
        f"data/train-0000{part}-of-00002.parquet": parquet([tulu(2 * part + index) for index in range(2)])
        for part in range(2)
    }
    | {"README.md": card(["train"])},
    "datasets/Intel/orca_dpo_pairs": {
        "orca_rlhf.jsonl": "".join(json.dumps(orca(index)) + "\n" for index in range(4)).encode(),
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    },
    "datasets/Anthropic/hh-rlhf": hh_rlhf(tiny.hh_rows(4), tiny.hh_rows(2, start=4)),
}

READ = """
import contextlib, io, json, sys
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out, load_splits
from tandem.errors import UserError
from tandem.launch import held_out

def parts(pair):
    return [pair["prompt"], pair["chosen"], pair["rejected"]]

for options in json.loads(sys.argv[1]):
    screen, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(errors):
        try:
            data = DataOptions(**options)
            train, test = load_splits(data)
            answer = {"train": list(map(parts, train)), "test": list(map(parts, test))}
            answer["measured"] = len(load_held_out(data))
            if list(options) == ["dataset_name"]:
                held_out.main([options["dataset_name"]])
                answer["val_ratio"] = screen.getvalue().strip()
        except UserError as error:
            answer = {"error": str(error)}
    print(json.dumps(answer | {"said": errors.getvalue()}))
"""


class Hub:
    """What a process that reads from the Hub answers, by name of the asked."""

    def __init__(self, home: Path, asked: dict[str, dict[str, Any]], **environment: str) -> None:
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if key not in offline} | environment
        command = [sys.executable, "-c", READ, json.dumps(list(asked.values()))]
        done = subprocess.run(
            command, env=environment | {"HF_HOME": str(home)}, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        self.answers = dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


UF = "HuggingFaceH4/ultrafeedback_binarized"
ASKED: dict[str, dict[str, Any]] = {
    "ultrafeedback_binarized": {"dataset_name": str(RECIPES / "ultrafeedback_binarized" / "data.yaml")},
    "tulu3_preferences": {"dataset_name": str(RECIPES / "tulu3_preferences" / "data.yaml")},
    "orca_dpo_pairs": {"dataset_name": str(RECIPES / "orca_dpo_pairs" / "data.yaml")},
    "orca": {"dataset_name": "Intel/orca_dpo_pairs"},
    "orca by ratio": {"dataset_name": "Intel/orca_dpo_pairs", "val_ratio": 0.5},
    "hh": {"dataset_name": "Anthropic/hh-rlhf"},
    "which": {"dataset_name": UF},
    "prefs": {"dataset_name": UF, "dataset_train_split": "train_prefs[:2]"},
    "typo": {"dataset_name": "Intel/orca_dpo_pairs", "dataset_test_split": "tset"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def answers(home: Path) -> dict[str, Any]:
    with StubHub(REPOSITORIES).serving() as url:
        return Hub(home, ASKED, HF_ENDPOINT=url).answers


def test_ultrafeedback_binarized(answers: dict[str, Any]):
    """Three pairs and not nine; the prompt once, not in the answers."""
    answer = answers["ultrafeedback_binarized"]
    assert answer["train"] == [
        [[user(f"train_prefs {i}?")], [assistant(f"Good {i}.")], [assistant(f"Bad {i}.")]] for i in range(3)
    ]
    assert [pair[0] for pair in answer["test"]] == [[user(f"test_prefs {i}?")] for i in range(3)]
    assert answer["val_ratio"] == "0"


def test_tulu3_preferences(answers: dict[str, Any]):
    answer = answers["tulu3_preferences"]
    assert answer["train"] == [
        [[user(f"tulu {i}?")], [assistant(f"Good {i}.")], [assistant(f"Bad {i}.")]] for i in range(4)
    ]
    assert (answer["test"], answer["val_ratio"]) == ([], held_out.VAL_RATIO)


@pytest.mark.parametrize("name", ["orca_dpo_pairs", "orca"])
def test_a_set_without_a_test_split(answers: dict[str, Any], name: str):
    """Read as a file is that has none: nothing is held out, and the pipeline is told to hold some out."""
    answer = answers[name]
    system = {"role": "system", "content": "Answer briefly."}
    assert answer["train"] == [
        [[*([system] if i % 2 else []), user(f"orca {i}?")], [assistant(f"Good {i}.")], [assistant(f"Bad {i}.")]]
        for i in range(4)
    ]
    assert (answer["test"], answer["measured"], answer["val_ratio"]) == ([], 4, held_out.VAL_RATIO)
    assert "has no test split: using all of it" in answer["said"]
    assert len(answers["orca by ratio"]["test"]) == 2


def test_splits_are_named(answers: dict[str, Any]):
    assert answers["hh"]["val_ratio"] == "0"
    error = answers["which"]["error"]
    assert error.startswith(f"--dataset_name {UF}: no split train (has ")
    assert error.endswith("; name one with --dataset_train_split")
    assert set(SPLITS) == set(error.partition("(has ")[2].partition(")")[0].split(", "))
    assert [pair[0][0]["content"] for pair in answers["prefs"]["train"]] == ["train_prefs 0?", "train_prefs 1?"]
    assert [pair[0][0]["content"] for pair in answers["prefs"]["test"]] == [f"test_prefs {i}?" for i in range(3)]
    assert f"{UF} has no split test: using test_prefs\n" in answers["prefs"]["said"]
    assert answers["typo"]["error"].startswith("--dataset_name Intel/orca_dpo_pairs: no split tset (has train)")


def test_what_was_read_before_is_read_without_the_hub(answers: dict[str, Any], home: Path):
    asked = {name: ASKED[name] for name in ("ultrafeedback_binarized", "orca", "hh", "prefs")}
    again = Hub(home, asked, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1").answers
    for name, answer in again.items():
        assert {**answer, "said": ""} == {**answers[name], "said": ""}


def test_which_mixtures_hold_out(tmp_path: Path):
    (tmp_path / "split").mkdir()
    tiny.save_pairs(tmp_path / "split" / "train.jsonl", tiny.hh_rows(2))
    tiny.save_pairs(tmp_path / "split" / "test.jsonl", tiny.hh_rows(2))
    tiny.save_pairs(tmp_path / "one.jsonl", tiny.hh_rows(2))
    for names, expected in {("split", "one.jsonl"): False, ("split",): True, ("one.jsonl",): False}.items():
        entries = [{"dataset_name": name} for name in names]
        file = tmp_path / "mixture.yaml"
        file.write_text(json.dumps(entries if len(entries) > 1 else entries[0]))
        assert all_hold_out(DataOptions(str(file))) == expected
    assert not all_hold_out(DataOptions(str(tmp_path / "one.jsonl")))
    assert all_hold_out(DataOptions(str(tmp_path / "split")))
    with pytest.raises(UserError, match="no such file or folder"):
        all_hold_out(DataOptions(str(tmp_path / "gone.jsonl")))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*/data.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_says_which_data_it_is_for(recipe: Path):
    (source,) = sources_of(DataOptions(str(recipe)))
    assert source.options.dataset_name.count("/") == 1
    for stage in ("sft", "dpo"):
        assert (
            f"dataset_name: pipelines/recipes/{recipe.parent.name}/data.yaml"
            in (recipe.parent / f"{stage}.yaml").read_text().splitlines()
        )
