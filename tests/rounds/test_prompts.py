import json
from pathlib import Path

import pytest

from tandem.data.formats import prompt_id
from tandem.data.options import DataOptions
from tandem.data.sources import load_splits
from tandem.errors import UserError
from tandem.rounds.prompts import held_out_prompts, training_prompts
from tests import tiny

USER = [{"role": "user", "content": "hi"}]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"prompt": "hi"}, None),
        ({"prompt": "hi", "completion": " yes "}, "yes"),
        ({"prompt": USER}, None),
        ({"question": "hi"}, None),
        ({"instruction": "hi", "output": "x"}, None),
        ({"messages": USER}, None),
        ({"messages": [*USER, {"role": "assistant", "content": "yes"}]}, "yes"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "yes"),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, "yes"),
        ({"prompt": USER, "chosen": [{"role": "assistant", "content": "yes"}]}, None),
    ],
)
def test_prompts_with_and_without_answers(tmp_path: Path, row: dict, chosen: str | None):
    file = write(tmp_path / "p.jsonl", [row | {"extra": 3}])
    (prompt,) = training_prompts(DataOptions(dataset_name=str(file)))
    assert prompt.messages == USER
    assert prompt.chosen == chosen
    assert prompt.row["extra"] == 3


def test_a_system_turn_and_earlier_turns_are_kept(tmp_path: Path):
    turns = [
        {"role": "system", "content": "be brief"},
        *USER,
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "yes"},
    ]
    file = write(tmp_path / "p.jsonl", [{"messages": turns}])
    (prompt,) = training_prompts(DataOptions(dataset_name=str(file)))
    assert prompt.messages == turns[:4]


def test_the_test_split_is_never_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "d" / "train.jsonl", [{"prompt": f"q{i}"} for i in [1, 2, 3, 2, 1]])
    write(tmp_path / "d" / "test.jsonl", [{"messages": [{"role": "user", "content": "q2"}]}])
    options = DataOptions(dataset_name=str(tmp_path / "d"))
    assert [prompt.messages[0]["content"] for prompt in training_prompts(options)] == ["q1", "q3"]
    assert [prompt.messages[0]["content"] for prompt in held_out_prompts(options)] == ["q2"]
    assert capsys.readouterr().err == ""


def test_a_held_out_share_is_that_of_the_reader_of_pairs(tmp_path: Path):
    file = tiny.save_pairs(tmp_path / "p.jsonl", tiny.hh_rows(40))
    options = DataOptions(dataset_name=str(file), val_ratio=0.3)
    train, held_out = load_splits(options)
    assert {prompt.prompt_id for prompt in training_prompts(options)} == {prompt_id(row["prompt"]) for row in train}
    assert {prompt.prompt_id for prompt in held_out_prompts(options)} == {prompt_id(row["prompt"]) for row in held_out}
    assert len(held_out) == 12


def test_a_mixture_is_read_too(tmp_path: Path):
    for name, start in (("a", 0), ("b", 50)):
        tiny.save_pairs(tmp_path / f"{name}.jsonl", tiny.hh_rows(20, start=start))
    mixture = tmp_path / "m.yaml"
    mixture.write_text("".join(f"- {{dataset_name: {tmp_path / name}.jsonl, weight: 1}}\n" for name in "ab"))
    options = DataOptions(dataset_name=str(mixture), val_ratio=0.2)
    train, held_out = (
        {prompt.prompt_id for prompt in part} for part in (training_prompts(options), held_out_prompts(options))
    )
    assert len(held_out) == 8
    assert len(train) == 32
    assert not train & held_out


def test_data_that_hold_nothing_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = DataOptions(dataset_name=str(write(tmp_path / "p.jsonl", [{"prompt": "q"}])))
    assert len(training_prompts(options)) == 1
    assert "holds nothing out" in capsys.readouterr().err
    with pytest.raises(UserError, match="--val_ratio"):
        held_out_prompts(options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "has no prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "must be text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user's turn"),
        ({"messages": ["x"]}, "must be an object"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "must end with a user"),
    ],
)
def test_rows_that_are_no_prompt(tmp_path: Path, row: dict, said: str):
    file = write(tmp_path / "p.jsonl", [{"prompt": "q"}, row])
    with pytest.raises(UserError, match=said) as error:
        training_prompts(DataOptions(dataset_name=str(file)))
    assert "row 2" in str(error.value)
    assert len(training_prompts(DataOptions(dataset_name=str(file), max_bad_rows=1))) == 1


def test_a_column_by_another_name(tmp_path: Path):
    file = write(tmp_path / "p.jsonl", [{"ask": "hi"}])
    assert training_prompts(DataOptions(dataset_name=str(file), prompt_key="ask"))[0].messages == USER
    with pytest.raises(UserError, match="no column 'gone'"):
        training_prompts(DataOptions(dataset_name=str(file), prompt_key="gone"))
