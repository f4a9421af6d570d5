from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.formats import (
    FORMATS,
    RowError,
    check_format,
    choose_format,
    columns_of,
    detect_format,
    parse_transcript,
    prompt_id,
    to_canonical,
    to_transcript,
)
from tandem.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# One row of each format, and what becomes of it: prompt, chosen, rejected
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "hh": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 5",
        },
        ([user("Hi"), assistant("Hello"), user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
    "prompt_pair": ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, ("2+2?", " 4", " 5")),
    "alpaca": (
        {"instruction": "Translate", "input": "Hund", "chosen": "dog", "rejected": "cat"},
        ([user("Translate\n\nHund")], [assistant("dog")], [assistant("cat")]),
    ),
    "orca": (
        {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "Well, 4"},
        ([system("Be brief."), user("2+2?")], [assistant("4")], [assistant("Well, 4")]),
    ),
    "messages": (
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        ([user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        ([user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
}


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_example(name: str):
    row, (prompt, chosen, rejected) = EXAMPLES[name]
    assert detect_format(row) == name
    pair = to_canonical(row, name)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (prompt, chosen, rejected)


def test_pair_id_is_of_the_content():
    row = EXAMPLES["prompt_pair"][0]
    assert to_canonical(row, "prompt_pair")["pair_id"] == to_canonical({**row, "extra": 1}, "prompt_pair")["pair_id"]
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    assert to_canonical(row, "prompt_pair")["pair_id"] != to_canonical(swapped, "prompt_pair")["pair_id"]
    assert len(prompt_id("2+2?")) == 16


def hh(chosen: str, rejected: str) -> dict[str, Any]:
    return to_canonical({"chosen": chosen, "rejected": rejected}, "hh")


def test_hh_prompt_ends_before_the_last_shared_assistant_turn():
    """Where the conversations part earlier than at their end, the answer has several turns."""
    pair = hh(
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "\n\nHuman: a\n\nAssistant: x\n\nHuman: y\n\nAssistant: z",
    )
    assert pair["prompt"] == [user("a")]
    assert pair["chosen"] == [assistant("b"), user("c"), assistant("d")]
    assert pair["rejected"] == [assistant("x"), user("y"), assistant("z")]


def test_hh_prompt_never_ends_in_the_middle_of_an_answer():
    pair = hh("\n\nHuman: a\n\nAssistant: same start, good", "\n\nHuman: a\n\nAssistant: same start, bad")
    assert pair["chosen"] == [assistant("same start, good")]


def test_hh_with_equal_answers_keeps_them():
    pair = hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: b")
    assert pair["chosen"] == pair["rejected"] == [assistant("b")]


def test_hh_markers_inside_a_line_are_text():
    pair = hh("\n\nHuman: say\nHuman: x\n\nAssistant: The Human: one", "\n\nHuman: say\nHuman: x\n\nAssistant: no")
    assert pair["prompt"] == [user("say\nHuman: x")]
    assert pair["chosen"] == [assistant("The Human: one")]


def test_prompt_pair_understands_a_leading_human():
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "chosen": " d ", "rejected": " e"}
    pair = to_canonical(row, "prompt_pair")
    assert pair["prompt"] == [user("a"), assistant("b"), user("c")]
    assert pair["chosen"] == [assistant("d")]
    assert to_canonical({**row, "prompt": "Human: a"}, "prompt_pair")["prompt"] == [user("a")]


def test_alpaca_with_a_system_message_and_without_input():
    row = {"instruction": "Go", "input": "", "system": "Be nice.", "chosen": "a", "rejected": "b"}
    assert to_canonical(row, "alpaca")["prompt"] == [system("Be nice."), user("Go")]
    assert to_canonical({**row, "input": None, "system": None}, "alpaca")["prompt"] == [user("Go")]


def test_messages_with_and_without_the_prompt_repeated():
    prompt = [system("s"), user("q")]
    explicit = {"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}
    repeated = {"prompt": prompt, "chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b")]}
    implicit = {"chosen": repeated["chosen"], "rejected": repeated["rejected"]}
    expected = to_canonical(explicit, "messages")
    assert expected["prompt"] == prompt
    assert to_canonical(repeated, "messages") == expected
    assert to_canonical(implicit, "messages") == expected


def test_sharegpt_system_column():
    row = {**EXAMPLES["sharegpt"][0], "system": "s"}
    assert to_canonical(row, "sharegpt")["prompt"] == [system("s"), user("2+2?")]


@pytest.mark.parametrize(
    ("data_format", "change", "message"),
    [
        ("hh", {"chosen": "no markers"}, "field 'chosen': not a transcript: must begin with 'Human:'"),
        ("hh", {"chosen": "Hi\n\nHuman: a\n\nAssistant: b"}, "field 'chosen': not a transcript: must begin with"),
        ("hh", {"rejected": "\n\nHuman: x\n\nAssistant: 5"}, "fields 'chosen' and 'rejected': share no prompt that"),
        ("hh", {"chosen": None}, "field 'chosen': must be text, not null"),
        (
            "hh",
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: "},
            "field 'chosen': the completion is empty",
        ),
        ("prompt_pair", {"rejected": " \n"}, "field 'rejected': the completion is empty"),
        ("prompt_pair", {"chosen": 4}, "field 'chosen': must be text, not a number"),
        ("prompt_pair", {"chosen": "\ud83d"}, "field 'chosen': has half of a surrogate pair, which is no character"),
        ("prompt_pair", {"prompt": "a\udfff"}, "field 'prompt': has half of a surrogate pair, which is no character"),
        ("prompt_pair", {"prompt": "Human: a\n\nAssistant: b"}, "field 'prompt': must end with a user's turn"),
        ("orca", {"question": float("nan")}, "field 'question': must be text, not a number"),
        ("messages", {"chosen": "4"}, "field 'chosen': must be a list of messages, not text"),
        ("messages", {"chosen": []}, "field 'chosen': must be a list of messages, not an empty one"),
        ("messages", {"chosen": [{"role": "user"}]}, "field 'chosen', message 1: 'content' is missing"),
        (
            "messages",
            {"chosen": [assistant("a"), None]},
            "field 'chosen', message 2: must be an object with 'role' and",
        ),
        (
            "messages",
            {"chosen": [{"role": "user", "content": None}]},
            "field 'chosen', message 1: 'content' must be te",
        ),
        (
            "messages",
            {"chosen": [{"role": ["user"], "content": ""}]},
            "field 'chosen', message 1: 'role' must be text,",
        ),
        (
            "messages",
            {"chosen": [assistant("a")], "rejected": [user("b")], "prompt": [user("q")]},
            "field 'rejected': the completion must begin with an assistant's turn, not user's",
        ),
        (
            "messages",
            {"chosen": [user("2+2?"), assistant("4"), user("?")]},
            "field 'chosen': the completion must end with an assistant's turn, not user's",
        ),
        ("prompt_pair", {"chosen": "a\0b"}, "field 'chosen': has a NUL character, which no text has"),
        ("prompt_pair", {"prompt": ""}, "field 'prompt': the prompt is empty"),
        (
            "prompt_pair",
            {"rejected": "ab" * 5_000_001},
            "field 'rejected': has 10,000,002 characters; more than 10,000,000",
        ),
        ("prompt_pair", {"images": [b"png"]}, "field 'images': is not empty, and Tandem trains on text only"),
        (
            "messages",
            {"chosen": [{"role": "narrator", "content": "x"}]},
            "field 'chosen', message 1: 'role' must be one of system, user",
        ),
        ("messages", {"prompt": [user("a"), system("b"), user("c")]}, "field 'prompt': a system turn may only come fi"),
        ("sharegpt", {"conversations": []}, "field 'conversations': must be a list of messages, not an"),
        (
            "sharegpt",
            {"chosen": {"from": "bot", "value": "x"}},
            "field 'chosen', message 1: 'from' must be one of human, us",
        ),
        ("sharegpt", {"chosen": {"value": "x"}}, "field 'chosen', message 1: 'from' is missing"),
    ],
)
def test_bad_rows(data_format: str, change: dict[str, Any], message: str):
    with pytest.raises(RowError) as error:
        to_canonical({**EXAMPLES[data_format][0], **change}, data_format)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_a_missing_answer_is_said_to_be_missing(name: str, field: str):
    row = {key: value for key, value in EXAMPLES[name][0].items() if key != field}
    with pytest.raises(RowError, match=field):
        to_canonical(row, name)


def places(*names: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"f.jsonl row {index}", EXAMPLES[name][0]) for index, name in enumerate(names, 1)]


def test_the_format_is_chosen_from_all_rows():
    assert choose_format(places("orca", "orca")) == ("orca", "f.jsonl row 1")
    assert choose_format(places("hh", "orca", "orca")) == ("orca", "f.jsonl row 2")
    with pytest.raises(RowError) as error:
        check_format(EXAMPLES["hh"][0], "orca", "f.jsonl row 2")
    assert str(error.value).startswith("looks like hh, but f.jsonl row 2 looks like orca: a source has one format;")


@pytest.mark.parametrize("bad", [None, "", 5])
def test_a_row_whose_values_tell_no_format_is_left_to_the_converter(bad: object):
    row = {"chosen": bad, "rejected": bad}
    assert choose_format([("f.jsonl row 1", row), *places("hh")]) == ("hh", "f.jsonl row 1")
    check_format(row, "hh", "f.jsonl row 1")


@pytest.mark.parametrize("column", ["prompt", "question", "instruction"])
def test_columns_tell_the_format_where_no_value_does(column: str):
    name = {"prompt": "prompt_pair", "question": "orca", "instruction": "alpaca"}[column]
    assert choose_format([("f row 1", {column: "q", "chosen": 1, "rejected": 2})]) == (name, "f row 1")


def test_no_format_names_the_row_and_its_columns():
    with pytest.raises(UserError) as error:
        choose_format([("f.jsonl row 2", {"text": "a", "label": 1})])
    assert str(error.value).startswith("f.jsonl row 2: no known preference format has the columns text, label; name it")
    with pytest.raises(UserError, match="f row 1: has no prompt: 'chosen' and 'rejected' are no transcripts"):
        choose_format([("f row 1", {"chosen": "a", "rejected": "b"})])


def test_a_message_names_some_columns_of_many():
    assert columns_of({f"{index:02}" + "x" * 50: 1 for index in range(14)}).endswith("11" + "x" * 38 + ", and 2 more")
    assert columns_of({}) == "none"


# Rows as they are on the Hub, cut short: the data set's name, and the format they are found to have
REAL_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Anthropic/hh-rlhf": ("hh", EXAMPLES["hh"][0]),
    "Dahoas/rm-static": (
        "prompt_pair",
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "response": " 4", "chosen": " 4", "rejected": " 5"},
    ),
    "Intel/orca_dpo_pairs": ("orca", {"system": "", "question": "2+2?", "chosen": "4", "rejected": "5"}),
    "HuggingFaceH4/ultrafeedback_binarized": (
        "messages",
        {
            "prompt": "2+2?",
            "prompt_id": "0" * 64,
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
            "messages": [user("2+2?"), assistant("4")],
            "score_chosen": 9.0,
            "score_rejected": 1.0,
        },
    ),
    "argilla/dpo-mix-7k": (
        "messages",
        {"dataset": "x", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        "messages",
        {
            "source": "x",
            "prompt": "2+2?",
            "question": "2+2?",
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
        },
    ),
    "trl-lib/tldr-preference": ("prompt_pair", {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}),
    "hiyouga/DPO-En-Zh-20k": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ),
    "LLaMA-Factory's alpaca": ("alpaca", {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"}),
}


@pytest.mark.parametrize("name", REAL_SHAPES)
def test_real_shapes(name: str):
    data_format, row = REAL_SHAPES[name]
    assert detect_format(row) == data_format
    pair = to_canonical(row, data_format)
    whole = pair["prompt"] if isinstance(pair["prompt"], str) else "".join(turn["content"] for turn in pair["prompt"])
    answers = [
        pair[side] if isinstance(pair[side], str) else pair[side][0]["content"] for side in ("chosen", "rejected")
    ]
    assert whole.removeprefix("HiHello") == "2+2?"
    assert [answer.strip() for answer in answers] == ["4", "5"]


def test_a_system_column_is_read_in_every_format_that_has_no_turns():
    for name in ("prompt_pair", "alpaca", "orca"):
        pair = to_canonical({**EXAMPLES[name][0], "system": "Be brief."}, name)
        assert pair["prompt"][0] == system("Be brief.")
    row = {"system": "Be brief.", "prompt": "Human: a", "chosen": "b", "rejected": "c"}
    assert to_canonical(row, "prompt_pair")["prompt"] == [system("Be brief."), user("a")]
    row = {"system": "Be brief.", "prompt": "q", "chosen": [assistant("b")], "rejected": [assistant("c")]}
    assert to_canonical(row, "messages")["prompt"] == [system("Be brief."), user("q")]


def test_sharegpt_answers_may_be_lists():
    row = EXAMPLES["sharegpt"][0]
    assert to_canonical({**row, "chosen": [row["chosen"]]}, "sharegpt") == to_canonical(row, "sharegpt")


# What a transcript can hold: no turn marker, and no space at the ends, which is not part of a turn
contents = (
    st.text(st.characters(codec="utf-8"), max_size=20)
    .map(str.strip)
    .filter(lambda text: "\0" not in text and "Human:" not in text and "Assistant:" not in text)
)


@given(st.lists(contents, min_size=1, max_size=6))
def test_transcripts_are_read_back(texts: list[str]):
    messages = [(user if index % 2 == 0 else assistant)(text) for index, text in enumerate(texts)]
    assert parse_transcript(to_transcript(messages), "prompt") == messages


@given(st.lists(contents.filter(bool), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), contents)
def test_hh_rows_are_taken_apart_where_they_were_put_together(texts: list[str], other: str):
    """A prompt, its answer and another answer, as two transcripts, give back all three."""
    messages = [(user if index % 2 == 0 else assistant)(text) for index, text in enumerate(texts)]
    prompt, answer = messages[:-1], messages[-1]
    if not other:
        other = "no"
    row = {
        "chosen": to_transcript([*prompt, answer]),
        "rejected": to_transcript([*prompt, assistant(other)]),
    }
    pair = to_canonical(row, "hh")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (prompt, [answer], [assistant(other)])


def test_a_system_turn_comes_before_the_first_marker():
    assert to_transcript([system("Be nice."), user("a")]) == "Be nice.\n\nHuman: a"
