import random

import numpy as np
import pytest

from tandem.data.shortcuts import FEWEST, bag_of_words, pick_longer
from tests.data.pairs import pair

WORDS = "apple river stone cloud table green quick happy small large north south bread water light".split()  # noqa: SIM905


def random_pairs(count: int, keyword: str | None = None, seed: int = 0) -> list[dict]:
    """Answers of random words; with `keyword`, one of them in most chosen answers."""
    noise = random.Random(seed)
    rows = []
    for index in range(count):
        chosen, rejected = (" ".join(noise.choices(WORDS, k=12)) for _ in range(2))
        if keyword and noise.random() < 0.9:
            chosen += f" {keyword}"
        rows.append(pair(f"q{index}", chosen, rejected, index + 1))
    return rows


def test_pick_longer_by_hand():
    """Chosen longer, shorter, longer, equal: right in 2.5 of 4."""
    found = pick_longer(np.array([[3, 1], [1, 3], [9, 2], [4, 4]]))
    assert found["value"] == 0.625
    assert found["n"] == 4
    assert found["low"] < 0.625 < found["high"]


def test_a_keyword_is_found_and_named():
    found = bag_of_words(random_pairs(400, "certainly"))
    assert found is not None
    assert found["value"] > 0.9
    assert found["chosen_words"][0] == "certainly"


def test_noise_is_not_a_shortcut():
    found = bag_of_words(random_pairs(600))
    assert found is not None
    assert found["low"] < 0.5 < found["high"]


def test_a_prompt_is_never_in_both_folds():
    """Each prompt has one random answer preferred in all its rows: only seeing the prompt in training could tell."""
    unique = random_pairs(40)
    rows = [row for row in unique for _ in range(10)]
    found = bag_of_words(rows)
    assert found is not None
    assert found["value"] < 0.8


@pytest.mark.parametrize("rows", [random_pairs(FEWEST - 1), random_pairs(4) * 50], ids=["few pairs", "few prompts"])
def test_too_little_to_tell(rows: list[dict]):
    assert bag_of_words(rows) is None


def test_answers_without_a_word_in_common():
    assert bag_of_words([pair(f"q{i}", f"a{i}", f"b{i}", i) for i in range(FEWEST)]) is None
