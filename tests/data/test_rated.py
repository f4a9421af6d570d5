"""Rated and ranked answers, in the raw shapes of UltraFeedback and Nectar, as pairs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.balance import Balance
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs, load_splits
from tandem.errors import UserError


def ultrafeedback(scores: list[Any], instruction: str = "Why is the sky blue?") -> dict[str, Any]:
    """A row of openbmb/UltraFeedback."""
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": [f"model-{index}" for index in range(len(scores))],
        "completions": [
            {
                "annotations": {"helpfulness": {"Rating": "4", "Rationale": f"Because {index}."}},
                "custom_system_prompt": f"You are number {index}.",
                "model": f"model-{index}",
                "principle": "helpfulness",
                "response": f"Answer {index}.",
                "critique": f"Critique {index}.",
                "overall_score": score,
                "fine-grained_score": 5.0 - index,
            }
            for index, score in enumerate(scores)
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def nectar(ranks: list[Any]) -> dict[str, Any]:
    """A row of berkeley-nest/Nectar: rank 1 is the best."""
    return {
        "prompt": "\n\nHuman: Why is the sky blue? \n\nAssistant: ",
        "answers": [
            {"answer": f"Answer {index}.", "model": f"model-{index}", "rank": rank} for index, rank in enumerate(ranks)
        ],
        "turns": 1,
        "num_responses": len(ranks),
        "source": ["sharegpt"],
        "good_natured": True,
    }


def load(folder: Path, *rows: dict[str, Any], balances: list[Balance] | None = None, **options: Any) -> list[Any]:
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(DataOptions(str(folder / "rated.jsonl"), **options), "train", None, balances)


def numbers(pairs: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Which answer was chosen, and which rejected."""

    def number(answer: Any) -> int:
        text = answer if isinstance(answer, str) else answer[0]["content"]
        return int(text.removeprefix("Answer ").removesuffix("."))

    return [(number(pair["chosen"]), number(pair["rejected"])) for pair in pairs]


def test_ultrafeedback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    balances: list[Balance] = []
    (pair,) = load(tmp_path, ultrafeedback([7.0, 8.5, 3.0, 6.5]), balances=balances)
    assert pair["prompt"] == [{"role": "user", "content": "Why is the sky blue?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "Answer 1."}]
    assert pair["rejected"] == [{"role": "assistant", "content": "Answer 2."}]
    assert pair["scores"] == [8.5, 3.0]
    told = capsys.readouterr().err
    place = f"{tmp_path}/rated.jsonl (train)"
    assert f"{place}: 1 pair of 1 prompt with rated answers: 1 pair from 1 prompt; 2 answers in no pair\n" in told
    unread = set(balances[0].unread)
    assert {f"completions[].{name}" for name in ("annotations", "custom_system_prompt", "critique", "model")} <= unread
    assert "score_chosen" not in unread and "score_chosen" in balances[0].read


def test_nectar(tmp_path: Path):
    """Seven answers, of which rank 1 is chosen and rank 7 rejected."""
    (pair,) = load(tmp_path, nectar([3, 7, 1, 2, 6, 5, 4]))
    assert pair["prompt"] == [{"role": "user", "content": "Why is the sky blue?"}]
    assert numbers([pair]) == [(2, 1)]
    assert pair["scores"] == [-1.0, -7.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, 2)]),
        ({"pair_strategy": "best_worst"}, [(1, 2)]),
        ({"pair_strategy": "all"}, [(1, 2), (0, 2), (3, 2), (1, 3), (1, 0), (0, 3)]),
        ({"pair_strategy": "all", "min_score_margin": 2}, [(1, 2), (0, 2), (3, 2)]),
        ({"min_score_margin": 5}, [(1, 2)]),
    ],
)
def test_strategies(tmp_path: Path, options: dict[str, Any], expected: list[tuple[int, int]]):
    """Scores 7, 8.5, 3 and 6.5: the widest margins first."""
    assert numbers(load(tmp_path, ultrafeedback([7.0, 8.5, 3.0, 6.5]), **options)) == expected


def test_the_best_against_one_at_random(tmp_path: Path):
    rows = [ultrafeedback([7.0, 8.5, 3.0, 6.5], f"Question {index}?") for index in range(30)]
    drawn = {seed: numbers(load(tmp_path, *rows, pair_strategy="best_random", data_seed=seed)) for seed in (42, 7)}
    for pairs in drawn.values():
        assert len(pairs) == 30
        assert {best for best, _ in pairs} == {1}
    assert drawn[42] == numbers(load(tmp_path, *rows, pair_strategy="best_random"))
    assert drawn[42] != drawn[7]
    assert {worst for _, worst in drawn[42]} == {0, 2, 3}


def test_how_many_pairs_each_prompt_gave(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        ultrafeedback([1, 2, 3], "a?"),
        ultrafeedback([5, 5], "b?"),
        ultrafeedback([4, None], "c?"),
        ultrafeedback([1, 2], "d?"),
    ]
    pairs = load(tmp_path, *rows, pair_strategy="all")
    assert [pair["row"] for pair in pairs] == [1, 1, 1, 4]
    told = "4 pairs of 4 prompts with rated answers: 1 pair from 1 prompt, 3 pairs from 1 prompt, none from 2 prompts "
    told += "(tied 1, fewer_than_two_scored 1)"
    assert told in capsys.readouterr().err


def test_answers_that_are_the_same_are_no_pair(tmp_path: Path):
    row = ultrafeedback([1, 9, 2])
    row["completions"][0]["response"] = row["completions"][1]["response"]
    assert numbers(load(tmp_path, row)) == [(1, 2)]


def test_the_score_that_was_named(tmp_path: Path):
    assert numbers(load(tmp_path, ultrafeedback([1, 2, 9]), score_key="fine-grained_score")) == [(0, 2)]
    row = {"prompt": "q?", "responses": ["Answer 0.", "Answer 1."], "my_rank": [2, 1]}
    assert numbers(load(tmp_path, row, score_key="my_rank")) == [(1, 0)]


def test_texts_beside_scores(tmp_path: Path):
    row = {"prompt": "q?", "generations": ["Answer 0.", "Answer 1.", " "], "ratings": [2, 4.5, 5]}
    (pair,) = load(tmp_path, row)
    assert (pair["prompt"], *numbers([pair])) == ("q?", (1, 0))


def test_pairs_of_a_prompt_are_held_out_together(tmp_path: Path):
    rows = [ultrafeedback([1, 2, 3], f"Question {index}?") for index in range(8)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load_splits(DataOptions(str(tmp_path / "rated.jsonl"), val_ratio=0.25, pair_strategy="all"))
    asked = [{pair["prompt"][0]["content"] for pair in part} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (18, 6)
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (
            {"prompt": "q?", "responses": ["a", "b"]},
            {},
            "field 'responses': its answers have neither scores (score, overall_score, fine-grained_score, rating, "
            "reward) nor ranks; name the key with --score_key",
        ),
        ({"prompt": "q?", "responses": ["a", "b"], "scores": [1]}, {}, "'scores': has 1 scores for 2 answers in 'resp"),
        (ultrafeedback([1, 2]), {"score_key": "grade"}, "its answers have no grade"),
        ({"prompt": "q?", "answers": [{"txt": "a"}], "scores": [1]}, {}, "field 'answers', answer 1: has none of resp"),
        ({"prompt": "q?", "answers": [3], "scores": [1]}, {}, "answer 1: must be text or an object, not a number"),
        (ultrafeedback([4, 4]), {}, "none of its 1 rated prompts gives a pair: tied 1"),
        ({"prompt": "q?", "chosen": "a", "rejected": "b"}, {"pair_strategy": "all"}, "--pair_strategy has no effect: "),
        ({"prompt": "q?", "chosen": "a", "rejected": "b"}, {"score_key": "x"}, "--score_key has no effect: "),
    ],
)
def test_refusals(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        load(tmp_path, row, **options)
    assert said in str(error.value)


def test_a_pair_with_other_answers_beside_it_is_that_pair(tmp_path: Path):
    row = {"prompt": "q?", "chosen": "a", "rejected": "b", "generations": ["a", "b", "c"], "ratings": [3, 2, 1]}
    (pair,) = load(tmp_path, row)
    assert (pair["chosen"], pair["rejected"]) == ("a", "b")
