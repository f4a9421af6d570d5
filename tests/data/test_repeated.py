"""Answers that begin with the prompt: without it where all do, refused where some do."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.errors import UserError

ASKED = "Capital of Peru?"
REPEATS = {"prompt": ASKED, "chosen": f"{ASKED} Lima.", "rejected": f"{ASKED}\n\nQuito."}
PLAIN = {"prompt": "Another question?", "chosen": "Yes.", "rejected": "No."}


def load(folder: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(DataOptions(str(file), **options), "train")


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def test_it_goes_where_all_rows_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    [pair] = load(tmp_path, REPEATS)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (ASKED, " Lima.", "\n\nQuito.")
    assert "the prompt at the beginning of chosen dropped in 1" in capsys.readouterr().err
    without = REPEATS | {"chosen": " Lima.", "rejected": "\n\nQuito."}
    assert pair["pair_id"] == load(tmp_path, without)[0]["pair_id"]
    for row in (
        as_messages(REPEATS),
        {"question": ASKED, "chosen": REPEATS["chosen"], "rejected": REPEATS["rejected"]},
    ):
        [pair] = load(tmp_path, row)
        assert [pair[side][0]["content"] for side in ("chosen", "rejected")] == ["Lima.", "Quito."]


def test_one_side_of_all_rows(tmp_path: Path):
    pairs = load(tmp_path, REPEATS | {"rejected": "Quito."}, PLAIN | {"chosen": "Another question? Yes."})
    assert [pair["chosen"] for pair in pairs] == [" Lima.", " Yes."]
    assert [pair["rejected"] for pair in pairs] == ["Quito.", "No."]


def test_where_some_rows_have_it_they_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a.jsonl row 2: field 'chosen': begins with the prompt, which would be"):
        load(tmp_path, PLAIN, REPEATS)
    assert [pair["row"] for pair in load(tmp_path, PLAIN, REPEATS, max_bad_rows=1)] == [1]
    with pytest.raises(UserError, match=r"a.jsonl row 1: field 'chosen': begins with the prompt"):
        load(tmp_path, as_messages(REPEATS), as_messages(PLAIN))
    # Most of one side: the answers would be told apart by it
    most = [REPEATS | {"rejected": "Quito."}] * 2
    with pytest.raises(UserError, match=r"a.jsonl row 1: field 'chosen'"):
        load(tmp_path, *most, PLAIN)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "Hi there!", "Hi."),  # a greeting
        ("Name a river", "Name a riverbank instead.", "Name a riverside."),  # another word
        ("What is the capital of Peru?", "What is the capital of Peru? Lima.", "Quito."),  # one answer says it again
        ("Say it after me: so be it", "Say it after me: so be it", "Say it after me: so be it"),  # nothing else
    ],
)
def test_what_is_an_answer_all_the_same(prompt: str, chosen: str, rejected: str, tmp_path: Path):
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}, PLAIN, PLAIN | {"prompt": "A third question?"}]
    pair = load(tmp_path, *rows)[0]
    assert (pair["chosen"], pair["rejected"]) == (chosen, rejected)
