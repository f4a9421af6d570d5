"""Files of answers, Tandem's own and other programs', as they are read to be compared."""

import json
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.judge.comparisons import paired, read_answers
from tandem.judge.options import label_of

ROW = {"prompt_id": "p", "messages": [{"role": "user", "content": "Why?"}], "text": "So."}


def rows(count=3):
    return [ROW | {"prompt_id": f"p{index}", "text": f"answer {index}"} for index in range(count)]


def answers(path, text, label="a"):
    path.write_text(text, encoding="utf-8")
    return read_answers(path, label)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
@pytest.mark.parametrize("between", ["\n", "\n\n", "\r\n"])
def test_no_row_is_lost(tmp_path, between, end):
    """Other programs leave out the last newline, which in a file of Tandem's own means that a kill tore the line."""
    lines = [json.dumps(row) for row in rows()]
    assert list(answers(tmp_path / "a.jsonl", "\ufeff" + between.join(lines) + end).rows.values()) == rows()
    assert list(answers(tmp_path / "a.json", json.dumps(rows())).rows.values()) == rows()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"messages": ["Why?"]}, "field 'messages', message 1: must be an object with 'role' and 'content'"),
        (ROW | {"messages": [{"role": "user"}]}, "message 1: 'content' is missing"),
        (ROW | {"messages": [{"content": "Why?"}]}, "message 1: 'role' is missing"),
        (ROW | {"messages": "Why?"}, "field 'messages' must be a list of messages, not text"),
        (ROW | {"text": None}, "field 'text' must be text, not null"),
        (ROW | {"prompt_id": 3}, "field 'prompt_id' must be text, not a number"),
        ({"prompt": "Why?", "response": "So."}, "field 'prompt_id' is missing: a row has prompt_id, messages and text"),
        (["Why?", "So."], "must be an object with columns, not a list"),
    ],
)
def test_a_row_that_is_no_answer_is_named(tmp_path, row, message):
    with pytest.raises(UserError) as refused:
        answers(tmp_path / "a.jsonl", json.dumps(ROW) + "\n" + json.dumps(row))
    assert str(refused.value).startswith(f"{tmp_path}/a.jsonl row 2: ") and message in str(refused.value)


def test_a_torn_last_row_is_named(tmp_path):
    with pytest.raises(UserError, match="row 2: not JSON"):
        answers(tmp_path / "a.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW)[:30])


def test_parts_of_a_message_are_one_text(tmp_path):
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    found = answers(tmp_path / "a.jsonl", json.dumps(ROW | {"messages": [{"role": "user", "content": parts}]}))
    assert found.rows["p"]["messages"] == ROW["messages"]


def test_a_second_answer_to_a_prompt_is_told(tmp_path, capsys):
    texts = [json.dumps(ROW | {"text": text}) for text in ("one", "two", "three")]
    assert answers(tmp_path / "a.jsonl", "\n".join(texts)).rows["p"]["text"] == "one"
    assert "a.jsonl: 2 rows answer prompts that an earlier row answers; the first" in capsys.readouterr().err


def test_answers_to_other_prompts_under_the_same_ids_are_refused(tmp_path):
    one = answers(tmp_path / "a.jsonl", json.dumps(ROW))
    other = answers(tmp_path / "b.jsonl", json.dumps(ROW | {"messages": [{"role": "user", "content": "Who?"}]}))
    with pytest.raises(UserError, match="prompt p has other messages in each; generate both on the same"):
        paired(one, other, ["p"])


def test_a_missing_file_names_what_there_is(tmp_path):
    (tmp_path / "generations_sft.jsonl").touch()
    with pytest.raises(UserError, match=r"dpo.jsonl: no such file; generate answers first; there are answers of sft$"):
        read_answers(tmp_path / "generations_dpo.jsonl", "dpo")
    with pytest.raises(UserError, match=r": a folder; name a file of answers in it, as .*/generations_dpo.jsonl"):
        read_answers(tmp_path, "dpo")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("generations_dpo.jsonl", "dpo"),
        ("generations_qwen2.5-lr5e-7.jsonl", "qwen2.5-lr5e-7"),
        ("generations_v2.1.jsonl.gz", "v2.1"),
        ("answers.json", "answers"),
        ("model", "model"),
    ],
)
def test_a_label_may_have_dots(name, label):
    """As `generate --models` takes them, and the report shows them."""
    assert label_of(Path(name)) == label
