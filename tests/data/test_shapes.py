"""Valid data in other words: read to the same pair as in ours, through the reader of files."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(name: str, value: str) -> dict[str, str]:
    return {"from": name, "value": value}


U, A, B = message("user", "Capital of Peru?"), message("assistant", "Lima."), message("assistant", "Quito.")
S = message("system", "Be brief.")
TEXT = {"chosen": "Lima.", "rejected": "Quito."}
LISTS = {"chosen": [A], "rejected": [B]}
ASKED = "Capital of Peru?"
AS_TEXT = (ASKED, "Lima.", "Quito.")
AS_MESSAGES = ([U], [A], [B])
WITH_SYSTEM = ([S, U], [A], [B])


def load(folder: Path, row: Any, name: str = "pairs.jsonl", **options: Any) -> list[dict[str, Any]]:
    (folder / name).write_text(row if isinstance(row, str) else json.dumps(row) + "\n")
    return load_pairs(DataOptions(str(folder / name), **options), "train")


def parts(pair: dict[str, Any]) -> tuple[Any, Any, Any]:
    return pair["prompt"], pair["chosen"], pair["rejected"]


CASES: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "a null question": ({"question": None, "prompt": ASKED, **TEXT}, AS_TEXT),
    "an empty instruction": ({"instruction": "", "input": "", "prompt": ASKED, **TEXT}, AS_TEXT),
    "a blank question beside a list": ({"question": " ", "prompt": [U], **LISTS}, AS_MESSAGES),
    "empty conversations": ({"conversations": [], "prompt": ASKED, **TEXT}, AS_TEXT),
    "a null prompt": ({"prompt": None, "question": ASKED, **TEXT}, AS_MESSAGES),
    "a list and text answers": ({"prompt": [S, U], **TEXT}, WITH_SYSTEM),
    "text parts": (
        {
            "prompt": [message("user", "") | {"content": [{"type": "text", "text": ASKED}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Lima."}]}],
            "rejected": [B],
        },
        AS_MESSAGES,
    ),
    "developer": ({"prompt": [message("developer", "Be brief."), U], **LISTS}, WITH_SYSTEM),
    "human and model": (
        {
            "prompt": [message("human", ASKED)],
            "chosen": [message("model", "Lima.")],
            "rejected": [message("Model", "Quito.")],
        },
        AS_MESSAGES,
    ),
    "sharegpt without conversations": (
        {
            "chosen": [said("human", ASKED), said("gpt", "Lima.")],
            "rejected": [said("human", ASKED), said("gpt", "Quito.")],
        },
        AS_MESSAGES,
    ),
    "sharegpt answers to a text": (
        {"prompt": ASKED, "chosen": said("gpt", "Lima."), "rejected": said("gpt", "Quito.")},
        AS_MESSAGES,
    ),
    "conversations with role and content": ({"conversations": [S, U], **LISTS}, WITH_SYSTEM),
    "conversations and answers of both kinds": (
        {"conversations": [U], "chosen": said("gpt", "Lima."), "rejected": B},
        AS_MESSAGES,
    ),
    "sharegpt with text answers": ({"conversations": [said("human", ASKED)], **TEXT}, AS_MESSAGES),
    "sharegpt with other names": (
        {
            "conversations": [said("developer", "Be brief."), said("human", ASKED)],
            "chosen": said("model", "Lima."),
            "rejected": said("chatgpt", "Quito."),
        },
        WITH_SYSTEM,
    ),
    "structs of lists": (
        {
            "prompt": {"role": ["system", "user"], "content": ["Be brief.", ASKED]},
            "chosen": {"role": ["assistant"], "content": ["Lima."]},
            "rejected": {"content": ["Quito."], "role": ["assistant"]},
        },
        WITH_SYSTEM,
    ),
    "structs of lists of ShareGPT": (
        {
            "conversations": {"from": ["human"], "value": [ASKED]},
            "chosen": {"from": ["gpt"], "value": ["Lima."]},
            "rejected": {"from": ["gpt"], "value": ["Quito."]},
        },
        AS_MESSAGES,
    ),
    "blanks in names": ({"prompt": ASKED, " chosen": "Lima.", "rejected ": "Quito."}, AS_TEXT),
    "capitals in names": ({"Prompt": ASKED, "Chosen": "Lima.", "REJECTED": "Quito."}, AS_TEXT),
    "axolotl's messages": ({"messages": [S, U], "chosen": A, "rejected": B}, WITH_SYSTEM),
}


@pytest.mark.parametrize("case", CASES)
def test_other_shapes(tmp_path: Path, case: str):
    row, expected = CASES[case]
    (pair,) = load(tmp_path, row)
    assert parts(pair) == expected
    (pair,) = load(tmp_path, row, name="PAIRS.JSONL")
    assert parts(pair) == expected
    (pair,) = load(tmp_path, row, name="pairs.ndjson")
    assert parts(pair) == expected


def test_a_csv_with_blanks_in_its_header(tmp_path: Path):
    (pair,) = load(tmp_path, f"Prompt, chosen, Rejected\n{ASKED},Lima.,Quito.\n", name="pairs.CSV")
    assert parts(pair) == AS_TEXT


def test_a_tool_in_conversations_with_role_and_content(tmp_path: Path):
    turns = [U, message("assistant", "Let me look."), message("tool", "Peru: Lima"), message("user", "And?")]
    (pair,) = load(tmp_path, {"conversations": turns, **LISTS})
    assert parts(pair) == (turns, [A], [B])


def test_columns_that_were_named_keep_their_names(tmp_path: Path):
    row = {"Prompt": ASKED, "Chosen": "Lima.", "chosen": "Arequipa.", "rejected": "Quito."}
    (pair,) = load(tmp_path, row, prompt_key="Prompt", chosen_key="Chosen")
    assert parts(pair) == AS_TEXT
    (pair,) = load(tmp_path, row)
    assert parts(pair) == (ASKED, "Arequipa.", "Quito.")  # of two, the one under the format's own name


def test_two_prompts_with_values_are_not_chosen_from(tmp_path: Path):
    with pytest.raises(UserError, match="could both be the prompt"):
        load(tmp_path, {"question": "Where?", "prompt": ASKED, **TEXT})


@pytest.mark.parametrize(
    ("row", "refusal"),
    [
        (
            {"prompt": {"role": ["user"], "content": [ASKED, "?"]}, **TEXT},
            "its lists role, content are not of one",
        ),
        (
            {"prompt": [message("narrator", "x"), U], **LISTS},
            "'role' must be one of system, user, assistant, tool, not",
        ),
        ({"question": None, "prompt": "", **TEXT}, "row 1: field "),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], **LISTS},
            "'content' has a part that is no text (image)",
        ),
        ({"anfrage": ASKED, **TEXT}, "name it with --prompt_key (columns are anfrage, chosen, rejected)"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, row: dict[str, Any], refusal: str):
    with pytest.raises(UserError) as error:
        load(tmp_path, row)
    assert refusal in str(error.value)
