"""Nothing of a row vanishes unnamed: what the reader does with each column and each key of a message."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.balance import Balance
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **parts: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **parts}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {}}}]
TEXT = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
LISTS = {"prompt": [user("Q?")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def load(tmp_path: Path, *rows: dict[str, Any], balances: list[Balance] | None = None, **options: Any) -> list[Any]:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), newline="")
    return load_pairs(DataOptions(str(file), **options), "train", balances=balances)


def refusal(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, *rows, **options)
    return str(error.value).removeprefix(f"{tmp_path / 'a.jsonl'} row 1: ")


# Input → prompt, chosen, rejected
READ: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "system beside conversations that repeat the prompt": (
        {
            "system": "Answer in French.",
            "prompt": "Q?",
            "chosen": [user("Q?"), assistant("Lima, oui.")],
            "rejected": [user("Q?"), assistant("Lima, yes.")],
        },
        ([system("Answer in French."), user("Q?")], [assistant("Lima, oui.")], [assistant("Lima, yes.")]),
    ),
    "system beside a list": (
        LISTS | {"system": "Answer in French."},
        ([system("Answer in French."), user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "system_prompt beside transcripts": (
        {
            "system_prompt": "Be kind.",
            "chosen": "\n\nHuman: Q?\n\nAssistant: a",
            "rejected": "\n\nHuman: Q?\n\nAssistant: b",
        },
        ([system("Be kind."), user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "input beside a prompt": (
        {"prompt": "Translate to French.", "input": "The cat sleeps.", "chosen": "Le chat dort.", "rejected": "Cat."},
        ("Translate to French.\n\nThe cat sleeps.", "Le chat dort.", "Cat."),
    ),
    "history of pairs": (
        {"history": [["Hi", "Hello!"]], "instruction": "And its length?", "chosen": "6,650 km.", "rejected": "Short."},
        (
            [user("Hi"), assistant("Hello!"), user("And its length?")],
            [assistant("6,650 km.")],
            [assistant("Short.")],
        ),
    ),
    "history of messages, as JSON in a text": (
        TEXT | {"system": "s", "history": json.dumps([user("Hi"), assistant("Hello!")])},
        ([system("s"), user("Hi"), assistant("Hello!"), user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "a tool's call and its result in the prompt": (
        {
            "prompt": [
                user("Weather?"),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "21 °C", "name": "weather"},
                user("And?"),
            ],
            "chosen": [assistant("Warm.")],
            "rejected": [assistant("Cold.")],
        },
        (
            [
                user("Weather?"),
                assistant("", tool_calls=[CALL]),
                {"role": "tool", "content": "21 °C", "name": "weather"},
                user("And?"),
            ],
            [assistant("Warm.")],
            [assistant("Cold.")],
        ),
    ),
    "reasoning": (
        LISTS
        | {
            "chosen": [assistant("Four.", reasoning_content="Two and two.")],
            "rejected": [assistant("Four.", reasoning_content="No idea.")],
        },
        (
            [user("Q?")],
            [assistant("Four.", reasoning_content="Two and two.")],
            [assistant("Four.", reasoning_content="No idea.")],
        ),
    ),
    "a user's turn inside the answers": (
        {
            "prompt": "Name a river.",
            "chosen": [assistant("The Nile."), user("Another?"), assistant("The Amazon.")],
            "rejected": [assistant("The Nile."), user("Another?"), assistant("No.")],
        },
        (
            [user("Name a river.")],
            [assistant("The Nile."), user("Another?"), assistant("The Amazon.")],
            [assistant("The Nile."), user("Another?"), assistant("No.")],
        ),
    ),
    "a list as JSON in a text": (
        {
            "prompt": "Capital of Peru?",
            "chosen": json.dumps([assistant("Lima.")]),
            "rejected": json.dumps([assistant("Quito.")]),
        },
        ([user("Capital of Peru?")], [assistant("Lima.")], [assistant("Quito.")]),
    ),
    "a list as JSON in JSON": (
        {
            "prompt": "Capital of Peru?",
            "chosen": json.dumps(json.dumps([assistant("Lima.")])),
            "rejected": json.dumps(json.dumps([assistant("Quito.")])),
        },
        ([user("Capital of Peru?")], [assistant("Lima.")], [assistant("Quito.")]),
    ),
    "a prompt that is one message": (
        LISTS | {"prompt": user("Q?")},
        ([user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "content in parts of other kinds": (
        LISTS | {"chosen": [{"role": "assistant", "content": [{"type": "output_text", "text": "a"}, "!"]}]},
        ([user("Q?")], [assistant("a!")], [assistant("b")]),
    ),
    "content in parts": (
        LISTS
        | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]}]},
        ([user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "white space around answers": (
        LISTS | {"chosen": [assistant(" a\r\nb\n\n")]},
        ([user("Q?")], [assistant("a\nb")], [assistant("b")]),
    ),
    "transcripts of Windows": (
        {"chosen": "\r\n\r\nHuman: Q?\r\n\r\nAssistant: a", "rejected": "\r\n\r\nHuman: Q?\r\n\r\nAssistant: b"},
        ([user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "transcripts beside a prompt": (
        {
            "prompt": "Q?",
            "chosen": "\n\nHuman: Q?\n\nAssistant: a",
            "rejected": "\n\nHuman: Q?\n\nAssistant: b",
        },
        ([user("Q?")], [assistant("a")], [assistant("b")]),
    ),
    "a second prompt that says the same": (
        TEXT | {"question": "Q?"},
        ([user("Q?")], [assistant("a")], [assistant("b")]),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_beside_prompt_and_answers_is_read(tmp_path: Path, name: str):
    row, expected = READ[name]
    [pair] = load(tmp_path, row)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == expected


def test_tools_and_template_keywords_are_kept(tmp_path: Path):
    keywords = {"enable_thinking": False}
    rows = [
        LISTS | {"tools": TOOLS, "chat_template_kwargs": keywords},
        LISTS | {"tools": json.dumps(TOOLS), "chat_template_kwargs": json.dumps(keywords)},
    ]
    pairs = load(tmp_path, *rows)
    assert [(pair["tools"], pair["chat_template_kwargs"]) for pair in pairs] == [(TOOLS, keywords)] * 2
    assert pairs[0]["pair_id"] == pairs[1]["pair_id"] != load(tmp_path, LISTS)[0]["pair_id"]
    called = assistant("", tool_calls=[CALL | {"function": {"name": "weather", "arguments": '{"city": "Lima"}'}}])
    [pair] = load(tmp_path, LISTS | {"chosen": [called]})
    assert pair["chosen"] == [assistant("", tool_calls=[CALL])]  # arguments as an object, which templates expect


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "context": (
        {"context": "Lima lies on the coast.", "question": "Where is it?", "chosen": "Coast.", "rejected": "Inland."},
        "field 'context': holds what no format reads ('Lima lies on the coast.'…): append it to the prompt with "
        "--input_key context, or leave it out with --ignore_columns context",
    ),
    "two prompts": (
        {"question": "Where is it?", "prompt": "Context: x. Where is it?", "chosen": "Coast.", "rejected": "Inland."},
        "columns 'prompt' and 'question' could both be the prompt: name it with --prompt_key",
    ),
    "another prompt than the one repeated": (
        {"prompt": "Other?", "chosen": [user("Q?"), assistant("a")], "rejected": [user("Q?"), assistant("b")]},
        "field 'prompt': is not in the conversation that 'chosen' and 'rejected' begin with",
    ),
    "two system messages": (
        TEXT | {"system": "One.", "system_prompt": "Two."},
        "columns system and system_prompt both hold a system message: name it with --system_key",
    ),
    "another system message than the list's": (
        LISTS | {"prompt": [system("One."), user("Q?")], "system": "Two."},
        "field 'prompt': begins with a system message, and the column of system messages holds another",
    ),
    "a history that is none": (TEXT | {"history": "Hi"}, "field 'history': must be a list of [question, answer] pairs"),
    "tools that are none": (TEXT | {"tools": "weather"}, "field 'tools': must be a list of JSON schemas"),
    "a tool without a schema": (
        TEXT | {"tools": [{"type": "function", "function": ""}]},
        "field 'tools': must be a list of JSON schemas",
    ),
    "keywords that are none": (TEXT | {"chat_template_kwargs": "x"}, "field 'chat_template_kwargs': must be an object"),
    "a video": (TEXT | {"videos": ["a.mp4"]}, "field 'videos': is not empty, and Tandem trains on text only"),
    "a function's call of old": (
        LISTS | {"chosen": [assistant("a", function_call={"name": "f"})]},
        "field 'chosen', message 1: 'function_call' is not empty, and no chat template here renders it",
    ),
    "an object that pandas wrote": (
        TEXT | {"chosen": "{'role': 'assistant', 'content': 'a'}"},
        "field 'chosen': is a Python list written as text",
    ),
    "an array that numpy wrote": (
        TEXT | {"chosen": "array([{'content': 'a', 'role': 'assistant'}], dtype=object)"},
        "field 'chosen': is a Python list written as text",
    ),
    "a list that pandas wrote": (
        TEXT | {"chosen": "[{'role': 'assistant', 'content': 'a'}]"},
        "field 'chosen': is a Python list written as text, as pandas' to_csv does",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str):
    row, message = REFUSED[name]
    assert refusal(tmp_path, row).startswith(message)


def test_what_was_refused_can_be_named_or_left_out(tmp_path: Path):
    context, two = REFUSED["context"][0], REFUSED["two prompts"][0]
    asked = [load(tmp_path, context, input_key="context"), load(tmp_path, context, ignore_columns=["context"])]
    assert [pairs[0]["prompt"][-1]["content"] for pairs in asked] == [
        "Where is it?\n\nLima lies on the coast.",
        "Where is it?",
    ]
    asked = [load(tmp_path, two, prompt_key=name) for name in ("question", "prompt")]
    assert [pairs[0]["prompt"] for pairs in asked] == ["Where is it?", "Context: x. Where is it?"]
    row = LISTS | {"chosen": [assistant("a", function_call={"name": "f"})]}
    assert load(tmp_path, row, ignore_columns=[".function_call"])[0]["chosen"] == [assistant("a")]


def test_everything_unread_is_listed_with_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        LISTS | {"chosen": [assistant(" a", weight=1)], "source": "x", "notes": f"n{index}", "score": 1.0, "none": None}
        for index in range(2)
    ]
    balances: list[Balance] = []
    load(tmp_path, *rows, LISTS, balances=balances, ignore_columns=["score"])
    [balance] = balances
    assert balance.read == {"prompt", "chosen", "rejected"}
    assert {name: (each.count, each.kind) for name, each in balance.unread.items()} == {
        "score": (2, "a number"),
        "source": (2, "text"),
        "notes": (2, "text"),
        ".weight": (2, "a number"),
    }
    assert balance.suspects() == ["notes"]
    assert capsys.readouterr().err == (
        f"{tmp_path / 'a.jsonl'} (train): 3 rows; read: chosen, prompt, rejected; NOT read: "
        "score: a number in 2 of 3 rows, left out by --ignore_columns; source: text in 2 of 3 rows; "
        "notes: text in 2 of 3 rows; .weight: a number in 2 of 3 rows; white space around answers dropped in 2\n"
    )


def test_the_check_reports_what_was_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from scripts.check_data import main

    file = tmp_path / "a.jsonl"
    rows = [TEXT | {"prompt": f"Q{index}?", "notes": f"n{index}", "source": "x"} for index in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--dataset_name", str(file), "--report", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    found = {finding["name"]: finding["examples"] for finding in report["findings"]}
    assert found["unread_columns"] == [{"found": "notes: text in 3 of 3 rows"}]
    assert found["ignored_columns"] == [{"found": "source: text in 3 of 3 rows"}]
    assert report["columns"][0]["unread"]["notes"] == {"count": 3, "kind": "text", "why": ""}
