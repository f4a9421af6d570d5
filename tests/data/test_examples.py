"""Rows of one answer, in the shapes that people fine-tune on, as SFT reads them."""

from pathlib import Path
from typing import Any

import pytest

from tandem.data.options import DataOptions, SFTDataOptions
from tandem.data.sources import load_pairs, load_splits
from tandem.errors import UserError
from tests import tiny


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    path = tiny.save_pairs(tmp_path / "rows.jsonl", list(rows))
    return load_pairs(SFTDataOptions(str(path), **options), "train")


ALPACA = {"instruction": "Translate.", "input": "The cat.", "output": "Le chat."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "21 °C"}
# Row → prompt and answer as messages, as SFT has them
SHAPES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "alpaca": (ALPACA, [user("Translate.\n\nThe cat.")], [assistant("Le chat.")]),
    "alpaca_without_input": (ALPACA | {"input": ""}, [user("Translate.")], [assistant("Le chat.")]),
    "gsm8k": ({"question": "2+2?", "answer": "#### 4"}, [user("2+2?")], [assistant("#### 4")]),
    "query_response": ({"query": "2+2?", "response": "4"}, "2+2?", "4"),
    "prompt_completion": ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
    "with_system": ({"system": "Be brief.", "prompt": "2+2?", "response": "4"}, [SYSTEM, user("2+2?")],
                    [assistant("4")]),
    "turns": ({"prompt": [user("2+2?")], "completion": [assistant("4")]}, [user("2+2?")], [assistant("4")]),
    "one_turn": ({"prompt": [user("2+2?")], "completion": assistant("4")}, [user("2+2?")], [assistant("4")]),
    "messages": ({"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]}, [SYSTEM, user("a")],
                 [assistant("b"), user("c"), assistant("d")]),
    "json_in_text": ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'},
                     [user("a")], [assistant("b")]),
    "sharegpt": ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}]}, [SYSTEM, user("a")], [assistant("b")]),
    "conversations_with_roles": ({"conversations": [user("a"), assistant("b")]}, [user("a")], [assistant("b")]),
    "tools": ({"messages": [user("Weather?"), CALL, RESULT, assistant("Warm.")], "tools": [TOOL]}, [user("Weather?")],
              [CALL, RESULT, assistant("Warm.")]),
    "pair": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?", "4"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path):
    row, prompt, answer = SHAPES[name]
    (found,) = read(tmp_path, row)
    assert (found["prompt"], found["chosen"]) == (prompt, answer)
    assert found.get("tools") == row.get("tools")


def test_a_text_is_read_whole_even_if_it_looks_like_a_transcript(tmp_path: Path):
    text = "\n\nHuman: a\n\nAssistant: b\n"
    (found,) = read(tmp_path, {"text": text})
    assert (found["format"], found["prompt"]) == ("text", text)
    (found,) = read(tmp_path, {"body": text, "title": "T"}, text_key="body")
    assert found["prompt"] == text


def test_a_column_is_named(tmp_path: Path):
    row = {"prompt": "2+2?", "reply": "4", "answer": "five"}
    assert read(tmp_path, row, completion_key="reply")[0]["chosen"] == "4"
    assert (
        read(tmp_path, {"ask": "2+2?", "reply": "4"}, prompt_key="ask", completion_key="reply")[0]["prompt"] == "2+2?"
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another prompt beside a conversation": (
        {
            "prompt": "Another?",
            "messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "a"}],
        },
        "columns 'prompt' and 'messages' could both be the prompt, and say different things",
    ),
    "a question beside a text": (
        {"question": "Q?", "text": "Something else."},
        "columns 'question' and 'text' could both be the prompt, and say different things",
    ),
    "two_answers": ({"prompt": "a", "output": "b", "response": "c"}, "'output' and 'response' could both be"),
    "context": ({"instruction": "a", "context": "it says so", "response": "b"}, "--input_key context"),
    "no_assistant": ({"messages": [user("a")]}, "has no assistant's turn"),
    "begins_with_an_answer": ({"messages": [assistant("a"), user("b"), assistant("c")]}, "answers nothing"),
    "ends_with_a_question": ({"messages": [user("a"), assistant("b"), user("c")]},
                             "field 'messages': the completion must end with an assistant's turn"),
    "empty_answer": ({"prompt": "a", "completion": " "}, "name the answer's column with --completion_key"),
    "no_text": ({"text": None}, "field 'text': must be text, not null"),
    "an_image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("b")]}, "no text"),
    "unknown": ({"a": "x", "b": "y"}, "no known format of examples or of pairs has the columns a, b"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_is_named_with_file_and_row(name: str, tmp_path: Path):
    row, said = REFUSED[name]
    with pytest.raises(UserError) as refusal:
        read(tmp_path, row)
    assert "rows.jsonl row 1: " in str(refusal.value)
    assert said in str(refusal.value)


def test_a_source_is_of_one_kind(tmp_path: Path):
    with pytest.raises(UserError, match="a source is of texts alone"):
        read(tmp_path, {"text": "a text"}, {"prompt": "a", "completion": "b"})


def test_dpo_does_not_take_examples(tmp_path: Path):
    path = tiny.save_pairs(tmp_path / "rows.jsonl", [SHAPES["messages"][0]])
    with pytest.raises(UserError, match="no known preference format has the columns messages"):
        load_pairs(DataOptions(str(path)), "train")


def test_what_is_not_read_is_told_under_the_names_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    read(tmp_path, {"prompt": "a", "completion": "b", "notes": "n1"}, {"prompt": "c", "completion": "d", "notes": "n2"})
    told = capsys.readouterr().err
    assert "read: completion, prompt" in told
    assert "NOT read: notes" in told
    assert "chosen" not in told


def test_no_text_is_trained_on_and_held_out(tmp_path: Path):
    path = tiny.save_pairs(tmp_path / "rows.jsonl", [{"text": f"text {index % 5}"} for index in range(20)])
    train, held_out = load_splits(SFTDataOptions(str(path), val_ratio=0.4))
    assert {row["prompt"] for row in train} & {row["prompt"] for row in held_out} == set()
    assert len(held_out) == 8
