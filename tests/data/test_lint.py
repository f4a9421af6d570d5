import copy
from pathlib import Path
from typing import Any

import pytest

from tandem.data.examine import ALONE, CHUNK, examine
from tandem.data.lint import KINDS, LEVELS, Finding, lint
from tandem.data.options import DROPPABLE
from tandem.options.model import TextOptions
from tests import tiny
from tests.data.pairs import pair, turns

LONG = (
    "please tell me how I should prepare the garden soil for tomatoes when the spring has been cold and wet this year"
)
ANSWER = (
    "Dig in two buckets of compost for each square metre and wait until the nights are above ten degrees to plant them."
)
OTHER = (
    "Do not bother with the soil at all because tomatoes grow anywhere and nothing that you do will make a difference."
)


def found(splits: dict[str, list[dict]], tokenizer: Any = None, **text: Any) -> dict[tuple[str, str], list[int]]:
    return {(each.split, each.name): list(each.rows) for each in lint(splits, tokenizer, TextOptions(**text))[1]}


def test_figures():
    rows = [pair("q1", "long answer", "short", 1), pair("q1", "x", "y", 2), pair("q3", "a", "bcd", 3, "b.jsonl")]
    split = lint({"train": rows}, tiny.tokenizer(), TextOptions())[0]["train"]
    assert split["pairs"] == 3
    assert split["prompts"] == 2
    assert split["sources"] == {"a.jsonl": 2, "b.jsonl": 1}
    assert split["formats"] == {"prompt_pair": 3}
    assert split["chosen_longer"] == pytest.approx(1 / 3)
    assert split["pick_longer"]["value"] == pytest.approx(0.5)
    assert split["bag_of_words"] is None
    assert split["tokens"]["prompt"] == {"median": 5.0, "max": 5}
    assert split["tokens"]["chosen"] == {"median": 2.0, "max": 12}


def test_the_fingerprint_is_of_the_pairs_in_any_order():
    rows = [pair("q1", "a", "b"), pair("q2", "a", "b")]

    def fingerprint(pairs: list[dict]) -> str:
        return lint({"train": pairs}, None, TextOptions())[0]["train"]["fingerprint"]

    assert fingerprint(rows) == fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint(rows[1:])


def test_duplicates_are_the_later_rows():
    rows = [pair("q", "a", "b", 1), pair("p", "a", "b", 2), pair("q", "a", "b", 3), pair("q", "a", "b", 4)]
    assert found({"train": rows}) == {("train", "duplicates"): [2, 3]}


def test_near_duplicates_need_all_three_parts():
    rows = [
        pair(LONG, ANSWER, OTHER, 1),
        pair(LONG.upper() + "!", ANSWER, OTHER.replace("a difference", "any difference"), 2),
        pair(LONG + " ", "No idea about that one, sorry, ask someone else.", OTHER, 3),
    ]
    assert found({"train": rows}) == {("train", "near_duplicates"): [1], ("train", "near_prompts"): [1, 2]}


def test_both_ways_round_counts_every_row_of_it():
    rows = [
        pair(LONG, ANSWER, OTHER, 1),
        pair("p", "a", "b", 2),
        pair(LONG, OTHER, ANSWER, 3),
        pair(LONG, ANSWER, OTHER, 4),
    ]
    assert found({"train": rows}) == {
        ("train", "duplicates"): [3],
        ("train", "contradictory"): [0, 2, 3],
        ("train", "repeated_prompts"): [2],
    }


def test_a_copy_from_before_its_opposite_is_contradictory_too():
    rows = [pair("q", "a", "b", 1), pair("q", "a", "b", 2), pair("q", "b", "a", 3), pair("p", "a", "b", 4)]
    assert found({"train": rows})["train", "contradictory"] == [0, 1, 2]


def test_an_answer_too_short_to_tell_its_language_is_not_in_another():
    rows = [pair(f"q{number}", ANSWER, OTHER, number) for number in range(3)] + [pair("q3", "oui", "non", 4)]
    assert ("train", "other_language") not in found({"train": rows})


def test_no_leak_is_no_finding():
    assert found({"train": [pair("q", "a", "b")], "held-out": [pair("p", "a", "b")]}) == {}


def test_a_nearly_turned_round_pair_is_contradictory():
    rows = [pair(LONG, ANSWER, OTHER, 1), pair(LONG, OTHER + " Really.", ANSWER, 2)]
    assert found({"train": rows})["train", "contradictory"] == [0, 1]


def test_leaks_are_of_the_training_rows():
    held_out = [pair(LONG, ANSWER, OTHER, 1), pair("hi", "a", "b", 2)]
    train = [pair("x", "a", "b", 1), pair("hi", "c", "d", 2), pair(LONG + ", please", "e", "f", 3)]
    assert found({"train": train, "held-out": held_out}) == {
        ("train", "leaked_prompts"): [1],
        ("train", "near_leaked_prompts"): [2],
    }
    assert found({"train": train}) == {}


def test_a_system_message_alone_does_not_make_prompts_near():
    system = {"role": "system", "content": LONG}
    rows = [
        pair([system, *turns(f"question {word}")], turns("a", first="assistant"), turns("b", first="assistant"), index)
        for index, word in enumerate(tiny.WORDS[:4])
    ]
    assert found({"train": rows}) == {}


def test_tokens_and_what_is_cut():
    """One byte is one token: `<|user|>q</s><|assistant|>` is 4, an answer of n letters and its `</s>` n + 1."""
    rows = [pair("q", "abc", "de", 1), pair("q2", "a" * 20, "de", 2), pair("q" * 30, "ab", "cd", 3)]
    assert found({"train": rows}, tiny.tokenizer(), max_length=12) == {
        ("train", "answer_lost"): [2],
        ("train", "answer_cut"): [1, 2],
    }


def test_special_tokens_in_the_data():
    rows = [pair("q", "done</s> and", "no no", 1), pair("q2", "ab", "cd", 2)]
    assert found({"train": rows}, tiny.tokenizer()) == {("train", "special_tokens"): [0]}


def test_a_refusing_template_is_an_error_with_its_text():
    strict = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('No.') }}{% endif %}" + tiny.TEMPLATE
    rows = [pair("q", "ab", "cd", 1), pair("bad", "ab", "cd", 2)]
    (finding,) = lint({"train": rows}, tiny.tokenizer(strict), TextOptions())[1]
    assert (finding.name, finding.level, list(finding.rows)) == ("template_refuses", "error", [1])
    assert finding.examples[0]["found"] == "No."


def test_length_bias_and_keywords():
    rows = [
        pair(f"question {i}", f"certainly {word} and more words", f"no {word}", i) for i in range(40) for word in "abc"
    ]
    findings = {each.name: each for each in lint({"train": rows}, None, TextOptions())[1]}
    assert findings["length_bias"].count == 120
    assert findings["keywords"].share == 1.0
    assert "for chosen: " in findings["keywords"].examples[0]["found"]


def test_another_language():
    german = "Das Wetter in den Bergen ändert sich schnell, also nimm eine warme Jacke mit und genug Wasser."
    rows = [pair("q", ANSWER, OTHER, 1), pair("q2", OTHER, ANSWER + " Also.", 2), pair("q3", german, german[:-1], 3)]
    assert found({"train": rows})["train", "other_language"] == [2]


def test_examples_say_where_and_what():
    rows = [pair("q", "ann.lee@mail.org", "no", 7), pair("q2", "same" * 100, "same" * 100, 8)]
    findings = {each.name: each.to_json() for each in lint({"train": rows}, None, TextOptions())[1]}
    assert findings["identical"]["examples"] == [
        {"file": "a.jsonl", "row": 8, "found": "the same text", "prompt": "q2"}
        | {side: ("same" * 100)[:160] for side in ("chosen", "rejected")}
    ]
    assert findings["identical"]["share"] == 0.5
    assert findings["identical"]["message"] == (
        "train: 1 of 2 pairs have chosen equal to rejected: they give no gradient"
    )
    assert findings["personal_data"]["examples"] == [{"file": "a.jsonl", "row": 7, "found": "email an…rg"}]


def test_every_kind_has_a_level_and_pairs_of_it_can_be_dropped_where_it_is_about_pairs():
    assert {level for level, _ in KINDS.values()} == set(LEVELS)
    of_the_template = {name for name in KINDS if name.startswith("template")}
    of_all = {"unreadable", "unread_columns", "ignored_columns", "length_bias", "keywords"}
    assert set(DROPPABLE) == KINDS.keys() - of_all - of_the_template
    assert str(Finding("identical", "train", 1, 2)).startswith("train: 1 of 2 pairs have")


def test_a_system_message_that_is_cut_whole():
    system = {"role": "system", "content": "Answer in French, " * 4}
    rows = [pair([system, *turns("q")], turns("a b", first="assistant"), turns("c d", first="assistant"), 1)]
    limits = {20: True, 200: False}
    for limit, is_cut in limits.items():
        names = {each.name for each in lint({"train": rows}, tiny.tokenizer(), TextOptions(max_prompt_length=limit))[1]}
        assert ("system_cut" in names) == is_cut
        assert ("prompt_cut" in names) == is_cut


def test_several_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch):
    rows = [
        pair(f"question {i} {tiny.WORDS[i % 20]}", f"answer {i}", "same" if i % 7 else f"answer {i}", i)
        for i in range(900)
    ]
    before = copy.deepcopy(rows)
    alone = examine(rows, tiny.tokenizer(), TextOptions(max_length=30))
    assert len(rows) > CHUNK < ALONE
    monkeypatch.setattr("tandem.data.examine.ALONE", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    together = examine(rows, tiny.tokenizer(), TextOptions(max_length=30))
    assert together.found == alone.found
    assert together.found["identical"].keys() == {row for row in range(900) if row % 7 == 0}
    for name in ("shingles", "ends", "pair_signatures", "prompt_signatures", "tokens", "sizes"):
        assert (getattr(together, name) == getattr(alone, name)).all()
    assert rows == before


def test_the_documentation_lists_every_finding_with_its_level():
    page = (Path(__file__).parents[2] / "docs" / "data-check.md").read_text()
    listed = [
        tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in page.splitlines() if line[:3] == "| `"
    ]
    assert listed == [(name, level) for name, (level, _) in KINDS.items()]


def test_the_second_way_round_is_found_though_its_origin_is_like_another():
    """Row 2 is turned round of row 1, which stands behind row 0, and is not near enough to row 0 itself."""
    words = " ".join(f"word{i}" for i in range(40))
    rows = [
        pair(LONG, words, OTHER, 1),
        pair(LONG, words + " ".join(f" more{i}" for i in range(9)), OTHER, 2),
        pair(LONG, OTHER, words + " ".join(f" more{i}" for i in range(9)), 3),
    ]
    assert found({"train": rows})["train", "near_duplicates"] == [1]
    assert {1, 2} <= set(found({"train": rows})["train", "contradictory"])
