import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.near import SIMILAR, Candidates, jaccard, shingles, signatures

LONG = "the quick brown fox jumps over the lazy dog while seven wizards brew a strong potion in the dark tower of glass"


def test_shingles_are_runs_of_three_words_without_case_and_punctuation():
    assert len(shingles("a b c d")) == 2  # a b c, b c d
    assert np.array_equal(shingles("One, two; THREE!"), shingles("one two three"))
    assert not np.array_equal(shingles("one two three"), shingles("one three two"))


def test_short_and_wordless_texts_differ():
    texts = ["yes", "no", "!!!", "???", "", "😀"]
    assert len({shingles(text).tobytes() for text in texts}) == len(texts)
    assert all(len(shingles(text)) == 1 for text in texts)


def test_text_without_spaces_is_compared_by_its_characters():
    left, right = "今天天气很好我们去公园散步吧", "今天天气很好我们去公园跑步吧"
    assert 0 < jaccard(shingles(left), shingles(right)) < 1


@given(st.sets(st.integers(0, 50), min_size=1), st.sets(st.integers(0, 50), min_size=1))
def test_jaccard(left: set[int], right: set[int]):
    got = jaccard(np.array(sorted(left), np.uint32), np.array(sorted(right), np.uint32))
    assert got == len(left & right) / len(left | right)


def test_like_finds_near_texts_and_not_others():
    """One word of 22 changed takes 3 of 20 shingles: similarity 17/23; one at the end takes 1: 19/21."""
    near = LONG.replace("glass", "stone")
    far = "completely different words that have nothing at all to do with any of the foxes and dogs from before"
    sets = [shingles(text) for text in (LONG, far, near)]
    assert jaccard(sets[0], sets[2]) == pytest.approx(19 / 21)
    index = Candidates()
    for key, signature in enumerate(signatures(sets[:2])):
        index.add(key, signature)
    assert index.like(signatures(sets[2:])[0]) == [0]


def test_few_pairs_at_the_threshold_are_missed():
    """1 − (1 − s^rows)^bands = 98% of pairs are found at s = 0.8, by the arithmetic of banding; and 1% at 0.3."""
    noise = np.random.default_rng(0)

    def found(similarity: float) -> float:
        hits = 0
        for _ in range(300):
            shared, own = round(1000 * similarity), round(1000 * (1 - similarity) / 2)
            values = noise.choice(2**32, shared + 2 * own, replace=False).astype(np.uint32)
            left, right = np.sort(values[: shared + own]), np.sort(np.r_[values[:shared], values[shared + own :]])
            assert jaccard(left, right) == pytest.approx(similarity, abs=0.01)
            index = Candidates()
            signature = signatures([left, right])
            index.add(0, signature[0])
            hits += index.like(signature[1]) == [0]
        return hits / 300

    assert found(SIMILAR) > 0.95
    assert found(0.3) < 0.06
