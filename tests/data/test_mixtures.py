import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.formats import prompt_id
from tandem.data.mixtures import Source, mix, sources_of
from tandem.data.options import DataOptions
from tandem.data.sources import hold_out, load_held_out, load_splits, load_training
from tandem.errors import UserError
from tandem.launch import held_out as held_out_share
from tests.tiny import hh_rows, save_pairs


def pairs(name: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "chosen": f"{i}", "rejected": f"no {i}"} for i in range(start, start + count)]


def mixture(folder: Path, *sources: Any) -> DataOptions:
    (folder / "mixture.yaml").write_text(yaml.safe_dump(list(sources)))
    return DataOptions(str(folder / "mixture.yaml"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pairs(tmp_path / "a.jsonl", pairs("a", 60))
    save_pairs(tmp_path / "b.jsonl", pairs("b", 10))
    return tmp_path


def names(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(Path(row["source"]).name for row in rows)


def test_weights_are_shares_of_the_training_pairs(folder: Path, capsys: pytest.CaptureFixture[str]):
    """b has 10 pairs for a third of the mixture, so that a gives 20 of its 60, in an order that mixes them."""
    options = mixture(folder, {"dataset_name": "a.jsonl", "weight": 2}, {"dataset_name": "b.jsonl"})
    rows = load_training(options)
    assert names(rows) == {"a.jsonl": 20, "b.jsonl": 10}
    assert len({row["pair_id"] for row in rows}) == 30
    assert set(names(rows[:10])) == {"a.jsonl", "b.jsonl"}
    assert load_training(options) == rows
    err = capsys.readouterr().err
    assert f"mixture: 20 of 60 training pairs of {folder}/a.jsonl\n" in err
    other = load_training(DataOptions(options.dataset_name, data_seed=1))
    assert names(other) == names(rows) and other != rows


def test_each_source_has_its_own_shape(folder: Path):
    (folder / "c.csv").write_text("q,good,bad\nhow,so,no\nwhy,so,no\n")
    save_pairs(folder / "d.json", hh_rows(2))
    options = mixture(
        folder,
        {"dataset_name": "c.csv", "prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"},
        {"dataset_name": "./d.json", "data_format": "hh"},
        {"dataset_name": str(folder / "a.jsonl"), "dataset_train_split": "train[:4]"},
    )
    rows = load_training(options)
    assert names(rows) == {"c.csv": 2, "d.json": 2, "a.jsonl": 2}
    assert {row["prompt"] for row in rows if row["source"].endswith("c.csv")} == {"how", "why"}


def test_held_out_prompts_are_of_each_source_and_in_no_training_pair(folder: Path):
    """b's prompts are a's too: what one source holds out, the other may not train on."""
    save_pairs(folder / "b.jsonl", pairs("a", 30))
    options = mixture(folder, {"dataset_name": "a.jsonl"}, {"dataset_name": "b.jsonl"})
    options.val_ratio = 0.2
    train, held_out = load_splits(options)
    assert names(held_out) == {"a.jsonl": 12, "b.jsonl": 6}
    assert not {prompt_id(row["prompt"]) for row in train} & {prompt_id(row["prompt"]) for row in held_out}
    assert load_held_out(options) == held_out
    assert load_training(options) == train
    assert set(names(held_out[:9])) == {"a.jsonl", "b.jsonl"}


def test_test_splits(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "split").mkdir()
    save_pairs(folder / "split" / "train.jsonl", pairs("c", 10))
    save_pairs(folder / "split" / "test.jsonl", pairs("c", 4, start=10))
    options = mixture(folder, {"dataset_name": "a.jsonl"}, {"dataset_name": "split", "weight": 0.5})
    train, held_out = load_splits(options)
    assert names(train) == {"a.jsonl": 20, "train.jsonl": 10}
    assert names(held_out) == {"test.jsonl": 4}
    assert load_held_out(options) == held_out
    assert load_training(options) == train
    without = mixture(folder, {"dataset_name": "a.jsonl"}, {"dataset_name": "b.jsonl"})
    assert len(load_held_out(without)) == 70
    assert "mixture.yaml has no test split: using all of it" in capsys.readouterr().err


def test_only_sources_without_a_held_out_split_are_drawn_from(folder: Path):
    (folder / "split").mkdir()
    save_pairs(folder / "split" / "train.jsonl", pairs("c", 10))
    # One of its prompts is a's too: nobody trains on it
    save_pairs(folder / "split" / "test.jsonl", [*pairs("c", 4, start=10), *pairs("a", 1)])
    sources = [{"dataset_name": "a.jsonl"}, {"dataset_name": "split", "dataset_test_split": "test[1:]"}]
    assert hold_out(mixture(folder, *sources)) == [False, True]
    options = DataOptions(mixture(folder, *sources).dataset_name, val_ratio=0.25, val_ratio_of="missing")
    train, held_out = load_splits(options)
    assert names(held_out) == {"a.jsonl": 15, "test.jsonl": 4}
    assert names(train)["train.jsonl"] == 10
    assert not {prompt_id(row["prompt"]) for row in train} & {prompt_id(row["prompt"]) for row in held_out}
    assert (load_training(options), load_held_out(options)) == (train, held_out)
    # Of all: the split that a source has is refused by name
    with pytest.raises(UserError, match="--dataset_test_split has no effect"):
        load_splits(DataOptions(options.dataset_name, val_ratio=0.25))
    # One source that has its own is read as without
    own = DataOptions(str(folder / "split"), val_ratio=0.25, val_ratio_of="missing")
    assert load_splits(own) == load_splits(DataOptions(str(folder / "split")))
    with pytest.raises(UserError, match="--val_ratio_of has no effect without --val_ratio"):
        DataOptions(str(folder / "split"), val_ratio_of="missing")


def test_the_pipeline_is_told_which_sources_lack_a_held_out_split(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "split").mkdir()
    save_pairs(folder / "split" / "train.jsonl", pairs("c", 10))
    save_pairs(folder / "split" / "test.jsonl", pairs("c", 4, start=10))
    mixed = mixture(folder, {"dataset_name": "a.jsonl"}, {"dataset_name": "split"}).dataset_name
    for name in (mixed, str(folder / "split"), str(folder / "a.jsonl")):
        held_out_share.main([name])
    assert capsys.readouterr().out == "0.25 missing\n0\n0.25\n"


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=2, max_size=5), st.integers(0, 3))
def test_the_largest_mixture_without_repeats(parts: list[tuple[int, float]], seed: int):
    sources = [Source(DataOptions(f"{index}.jsonl"), weight) for index, (_, weight) in enumerate(parts)]
    rows = [[{"source": index, "row": row} for row in range(count)] for index, (count, _) in enumerate(parts)]
    mixed = mix(sources, rows, seed)
    counts = Counter(row["source"] for row in mixed)
    assert len({(row["source"], row["row"]) for row in mixed}) == len(mixed)
    assert any(counts[index] == count for index, (count, _) in enumerate(parts))  # one source is used up
    scale = min(count / weight for count, weight in parts)
    for index, (_, weight) in enumerate(parts):
        assert abs(counts[index] - scale * weight) <= 0.5 or counts[index] == 1
    assert mix(sources, rows, seed) == mixed


A = {"dataset_name": "a.jsonl"}
B = {"dataset_name": "b.jsonl"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "{m}: must be a list of two or more sources, each with dataset_name and weight"),
        (
            json.dumps({"sources": [A, B]}),
            "{m}: must be a list of two or more sources, each with dataset_name and weight",
        ),
        (json.dumps([A]), "{m}: must be a list of two or more sources, each with dataset_name and weight"),
        ("- [", "{m}: not YAML: while parsing a flow node expected the node content, but found '<stream end>' …"),
        (json.dumps([A, "b.jsonl"]), "{m}: source 2: must have dataset_name and weight, not be text"),
        (json.dumps([A, {"weight": 1}]), "{m}: source 2: dataset_name is missing"),
        (
            json.dumps([A, B | {"weight": 0}]),
            "{m}: source 2: weight must be above 0, not 0.0; leave the source out instead",
        ),
        (json.dumps([A, B | {"weight": "much"}]), "{m}: source 2: weight must be a number, not 'much'"),
        (json.dumps([A, B | {"weigth": 1}]), "{m}: source 2: unknown option weigth; did you mean weight?"),
        (
            json.dumps([A, B | {"val_ratio": 0.1}]),
            "{m}: source 2: unknown option val_ratio; it is of the whole mixture: --val_ratio",
        ),
        (json.dumps([A, B | {"data_format": "csv"}]), "{m}: source 2: data_format must be one of …"),
        (json.dumps([A, A | {"weight": 2}]), "{m}: source 2 is source 1 again; give it once, with a higher weight"),
        (
            json.dumps([A, {"dataset_name": "mixture.yaml"}]),
            "{m}: source 2: {file} is a mixture itself; name its sources here",
        ),
        ("- {dataset_name: a.jsonl, weight: 1, weight: 2}\n", "{m}: option weight appears twice"),
        (json.dumps([A, {"dataset_name": "gone.jsonl"}]), "--dataset_name {folder}/gone.jsonl: no such file or folder"),
    ],
)
def test_refusals(folder: Path, content: str, message: str):
    file = folder / "mixture.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        load_training(DataOptions(str(file)))
    said = " ".join(str(error.value).split())
    expected = message.format(m=f"--dataset_name {file}", file=file, folder=folder)
    assert said.startswith(expected[:-1]) if expected.endswith("…") else said == expected


def test_options_of_a_source_are_not_of_the_mixture():
    with pytest.raises(UserError) as error:
        DataOptions("m.yaml", data_format="hh")
    assert str(error.value) == "--data_format has no effect with a mixture: give it to a source in m.yaml"


def test_a_hub_name_stays_one(folder: Path):
    options = mixture(folder, A, {"dataset_name": "Anthropic/hh-rlhf", "dataset_revision": "main"})
    assert [source.options.dataset_name for source in sources_of(options)] == [f"{folder}/a.jsonl", "Anthropic/hh-rlhf"]


def test_no_form_of_a_held_out_prompt_is_trained_on(folder: Path):
    """The same prompts as text, as messages, with white space, and in another format."""
    text = pairs("a", 10)
    save_pairs(folder / "a.jsonl", text)
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in text]
    for row in turns:
        row |= {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    save_pairs(folder / "b.jsonl", turns)
    save_pairs(folder / "c.jsonl", [{**row, "prompt": f" {row['prompt']}\n"} for row in text])
    save_pairs(folder / "d.jsonl", [{"question": row.pop("prompt"), **row} for row in text])
    options = mixture(folder, *({"dataset_name": f"{name}.jsonl"} for name in "abcd"))
    for seed in range(5):
        options.val_ratio, options.data_seed = 0.5, seed
        train, held_out = load_splits(options)

        def asked(rows: list[dict[str, Any]]) -> set[str]:
            prompts = [row["prompt"] for row in rows]
            return {(each if isinstance(each, str) else each[0]["content"]).strip() for each in prompts}

        assert asked(train) and not asked(train) & asked(held_out)
        assert asked(train) | asked(held_out) == {f"a {i}" for i in range(10)}
        assert {Path(row["source"]).name for row in train} == {f"{name}.jsonl" for name in "abcd"}
