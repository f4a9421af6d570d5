import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.check import CheckOptions, check, findings, run_check, to_markdown
from tandem.errors import UserError
from tandem.options import TextOptions
from tests import tiny


def pair(prompt: str, chosen: str, rejected: str, source: str = "a.jsonl") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "pair_id": f"{prompt}|{chosen}|{rejected}",
        "source": source,
    }


TRAIN = [
    pair("q1", "long answer", "short"),
    pair("q1", "long answer", "short"),
    pair("q2", "same", "same", "b.jsonl"),
    pair("q3", "a", "bcd"),
]


def test_counts():
    report = check({"train": TRAIN, "held-out": [pair("q3", "x", "y"), pair("q4", "x", "y")]}, None, TextOptions())
    assert report["splits"]["train"] == {
        "pairs": 4,
        "prompts": 3,
        "sources": {"a.jsonl": 3, "b.jsonl": 1},
        "fingerprint": report["splits"]["train"]["fingerprint"],
        "duplicate_pairs": 1,
        "identical_answers": 1,
        "several_turn_answers": 0,
        "chosen_longer": 0.5,
    }
    assert report["shared_prompts"] == 1
    assert findings(report) == [
        "train: 1 of 4 pairs are there more than once",
        "train: 1 of 4 pairs have chosen equal to rejected: they give no gradient",
        "1 prompts are in training and held-out data",
    ]


def test_the_fingerprint_is_of_the_pairs_in_any_order():
    def fingerprint(pairs: list[dict[str, Any]]) -> str:
        return check({"train": pairs}, None, TextOptions())["splits"]["train"]["fingerprint"]

    assert fingerprint(TRAIN) == fingerprint(TRAIN[::-1])
    assert fingerprint(TRAIN) != fingerprint(TRAIN[1:])


def test_one_split_shares_nothing_with_itself():
    assert check({"train": TRAIN}, None, TextOptions())["shared_prompts"] == 0


def test_several_turns():
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    row = pair("q", "", "") | {"prompt": [], "chosen": turns, "rejected": turns[:1]}
    assert check({"train": [row]}, None, TextOptions())["splits"]["train"]["several_turn_answers"] == 1


def test_tokens_and_what_is_cut():
    """One byte is one token: `<|user|>q</s><|assistant|>` is 4, an answer of n letters and its `</s>` n + 1."""
    rows = [pair("q", "abc", "a"), pair("q", "a" * 20, "a"), pair("q" * 30, "a", "b")]
    split = check({"train": rows}, tiny.tokenizer(), TextOptions(max_length=12))["splits"]["train"]
    assert split["tokens"]["prompt"] == {"median": 4.0, "max": 33}
    assert split["tokens"]["chosen"] == {"median": 4.0, "max": 21}
    assert split["tokens"]["rejected"] == {"median": 2.0, "max": 2}
    assert split["answers_cut"] == 2
    assert split["answers_lost"] == 1


def test_lost_and_cut_at_the_limit_itself():
    rows = [pair("q", "abc", "a")]  # 4 + 4 tokens
    for max_length, cut, lost in ((8, 0, 0), (7, 1, 0), (5, 1, 0), (4, 1, 1)):
        split = check({"train": rows}, tiny.tokenizer(), TextOptions(max_length=max_length))["splits"]["train"]
        assert (split["answers_cut"], split["answers_lost"]) == (cut, lost)


def test_table():
    report = check({"train": TRAIN}, None, TextOptions())
    assert "| train | 4 | 3 | 0.50 | not counted |" in to_markdown(report)
    assert "warning: train: 1 of 4 pairs are there more than once" in to_markdown(report)


def test_report_file_and_the_refusal_when_nothing_fits(tmp_path: Path, tiny_model: Path):
    options = CheckOptions(tokenizer_name_or_path=str(tiny_model), report=str(tmp_path / "data_report.json"))
    with pytest.raises(UserError, match="train: every prompt alone fills --max_length 3"):
        run_check(options, TextOptions(max_length=3), {"train": TRAIN})
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["splits"]["train"]["answers_lost"] == 4
    assert report["findings"]
