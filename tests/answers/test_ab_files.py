"""A/B files: whatever the shuffle, the winner is mapped back to who it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.answers import ab_files
from tandem.errors import UserError

SIDES = ("dpo", "chosen")


def rows(count: int) -> list[dict[str, Any]]:
    """Rows whose answers tell who gave them."""
    return [
        {
            "prompt_id": f"p{index}",
            "messages": [{"role": "user", "content": str(index)}],
            "answers": {"dpo": f"by the model {index}", "chosen": f"by people {index}", "base": "not shown"},
        }
        for index in range(count)
    ]


def questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ab_files.QUESTIONS).read_text().splitlines()]


@given(
    seed=st.integers(0, 2**40), wanted=st.lists(st.sampled_from(["model", "chosen", "tie"]), min_size=1, max_size=20)
)
def test_the_winner_is_right_under_any_shuffle(tmp_path_factory: pytest.TempPathFactory, seed: int, wanted: list[str]):
    """A judge who sees only texts, and names the letter of the side it was told to prefer."""
    folder = tmp_path_factory.mktemp("ab")
    pairs = rows(len(wanted))
    ab_files.write_questions(folder, pairs, *SIDES, seed)
    verdicts = []
    for question, want in zip(questions(folder), wanted, strict=True):
        by_model = {letter: question[f"answer_{letter.lower()}"].startswith("by the model") for letter in "AB"}
        assert sorted(by_model.values()) == [False, True]  # each side once
        letter = next(letter for letter, is_model in by_model.items() if is_model == (want == "model"))
        verdicts.append({"prompt_id": question["prompt_id"], "verdict": "tie" if want == "tie" else letter})
    file = folder / "verdicts.jsonl"
    file.write_text("\n".join(map(json.dumps, reversed(verdicts))))  # in any order, and with no newline at the end
    found = ab_files.read_winners(file, folder, pairs, *SIDES)
    assert found == {f"p{index}": want for index, want in enumerate(wanted)}
    # The same sides named the other way round: the same answers win, and `model` is the other one
    other_way = {"model": "dpo", "chosen": "model", "tie": "tie"}
    assert ab_files.read_winners(file, folder, pairs, *SIDES[::-1]) == {
        key: other_way[winner] for key, winner in found.items()
    }


def test_winner_by_hand():
    assert ab_files.winner("A", True, "base") == "model"
    assert ab_files.winner("A", False, "base") == "base"
    assert ab_files.winner("B", True, "base") == "base"
    assert ab_files.winner("B", False, "base") == "model"
    assert ab_files.winner("tie", True, "base") == ab_files.winner("tie", False, "base") == "tie"


def test_both_places_are_taken_evenly_and_by_the_seed():
    places = [ab_files.policy_is_a(f"p{index}", 1) for index in range(2000)]
    assert 900 < sum(places) < 1100
    assert places == [ab_files.policy_is_a(f"p{index}", 1) for index in range(2000)]
    assert places != [ab_files.policy_is_a(f"p{index}", 2) for index in range(2000)]


def test_the_questions_do_not_tell_who_is_who(tmp_path: Path):
    ab_files.write_questions(tmp_path, rows(5), *SIDES, 0)
    assert [set(question) for question in questions(tmp_path)] == [
        {"prompt_id", "messages", "answer_a", "answer_b"}
    ] * 5
    text = (tmp_path / ab_files.QUESTIONS).read_text()
    assert not any(word in text for word in ("dpo", "chosen", "policy", "seed"))
    assert "dpo" in (tmp_path / ab_files.KEY).read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt_id": "p9", "verdict": "A"}', "line 2: prompt_id 'p9' is none of"),
        ('{"prompt_id": "p1", "verdict": "a"}', "line 2: verdict must be A, B or tie, not 'a'"),
        ('{"prompt_id": "p1"}', "line 2: verdict must be A, B or tie, not None"),
        ('{"prompt_id": "p0", "verdict": "B"}', "line 2: prompt_id p0 has a verdict already"),
        ('{"prompt_id": ["p1"], "verdict": "B"}', "line 2: prompt_id ['p1'] is none of"),
        ("[]", "line 2: must be an object with prompt_id and verdict"),
        ("{", "cannot be read"),
    ],
)
def test_lines_that_are_no_verdict(tmp_path: Path, line: str, expected: str):
    ab_files.write_questions(tmp_path, rows(2), *SIDES, 0)
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"prompt_id": "p0", "verdict": "A"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        ab_files.read_winners(file, tmp_path, rows(2), *SIDES)
    assert expected in str(error.value)


def test_verdicts_on_other_answers_or_sides_are_refused(tmp_path: Path):
    file = tmp_path / "verdicts.jsonl"
    file.write_text('{"prompt_id": "p0", "verdict": "A"}\n')
    with pytest.raises(UserError, match="write the questions with --shuffle_ab first"):
        ab_files.read_winners(file, tmp_path, rows(2), *SIDES)
    ab_files.write_questions(tmp_path, rows(2), *SIDES, 0)
    with pytest.raises(UserError, match="is about chosen and dpo, not dpo and base"):
        ab_files.read_winners(file, tmp_path, rows(2), "dpo", "base")
    changed = rows(2)
    changed[1]["answers"]["dpo"] = "drawn anew"
    with pytest.raises(UserError, match="prompt p1 has other answers now"):
        ab_files.read_winners(file, tmp_path, changed, *SIDES)
    (tmp_path / ab_files.KEY).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ab_files.read_winners(file, tmp_path, rows(2), *SIDES)
    with pytest.raises(UserError, match=r"--ab_verdicts .*gone: cannot be read"):
        ab_files.write_questions(tmp_path, rows(2), *SIDES, 0)
        ab_files.read_winners(tmp_path / "gone", tmp_path, rows(2), *SIDES)
