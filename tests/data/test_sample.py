"""The sample preference set: what it says of itself, and that an answer alone gives nothing away."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from tandem.data.formats import detect_format, prompt_id, to_canonical
from tandem.data.sample import SPLITS, generate, sample_path

Pair = tuple[list[dict[str, str]], str, str]


def read(split: str) -> list[Pair]:
    """(prompt, chosen, rejected) of each row, through the project's own reader."""
    pairs = []
    for line in sample_path(split).read_text("utf-8").splitlines():
        row = json.loads(line)
        assert detect_format(row) == "hh"
        canonical = to_canonical(row, "hh")
        (chosen,), (rejected,) = canonical["chosen"], canonical["rejected"]
        pairs.append((canonical["prompt"], chosen["content"], rejected["content"]))
    return pairs


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[Pair]]:
    return {split: read(split) for split in SPLITS}


def test_generating_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "sample_path", lambda split: tmp_path / f"{split}.jsonl")
    generate.main()
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == sample_path(split).read_bytes()


def test_another_seed_gives_another_set() -> None:
    assert generate.build(generate.SEED + 1) != generate.build()


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        sample_path("validation")


def test_size_and_turns(pairs: dict[str, list[Pair]]) -> None:
    assert len(pairs["train"]) >= 480
    assert len(pairs["test"]) >= 128
    for of_split in pairs.values():
        questions = Counter(sum(message["role"] == "user" for message in prompt) for prompt, _, _ in of_split)
        assert set(questions) == {1, 2, 3}
        assert min(questions.values()) >= 10


def test_no_prompt_twice_and_no_answer_in_both_halves(pairs: dict[str, list[Pair]]) -> None:
    prompts = [prompt_id(prompt) for of_split in pairs.values() for prompt, _, _ in of_split]
    assert len(set(prompts)) == len(prompts)
    # Earlier turns count as well: a held-out answer must not be seen anywhere in training
    answers = {
        split: {text for prompt, *ends in of_split for text in (*ends, *spoken(prompt))}
        for split, of_split in pairs.items()
    }
    assert not answers["train"] & answers["test"]


def spoken(prompt: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in prompt if message["role"] == "assistant"]


def test_neighbors_swap_their_answers(pairs: dict[str, list[Pair]]) -> None:
    for of_split in pairs.values():
        for (_, chosen, rejected), (_, next_chosen, next_rejected) in zip(of_split[::2], of_split[1::2], strict=True):
            assert chosen != rejected
            assert (chosen, rejected) == (next_rejected, next_chosen)
        # With the swap, each text is chosen once and rejected once
        assert set(Counter(chosen for _, chosen, _ in of_split).values()) == {1}


def test_neither_answer_was_given_earlier(pairs: dict[str, list[Pair]]) -> None:
    for of_split in pairs.values():
        for prompt, chosen, rejected in of_split:
            assert not {chosen, rejected} & set(spoken(prompt))


def test_length_tells_nothing(pairs: dict[str, list[Pair]]) -> None:
    for of_split in pairs.values():
        for length in (len, lambda text: len(text.split())):
            differences = np.array([length(chosen) - length(rejected) for _, chosen, rejected in of_split])
            assert differences.sum() == 0
            assert preference_accuracy(differences) == 0.5


@pytest.mark.parametrize("vectorizer", [CountVectorizer, TfidfVectorizer])
@pytest.mark.parametrize("ngrams", [(1, 1), (1, 2)])
def test_a_bag_of_words_cannot_tell_chosen_from_rejected(
    pairs: dict[str, list[Pair]], vectorizer: Callable[..., CountVectorizer], ngrams: tuple[int, int]
) -> None:
    words = vectorizer(ngram_range=ngrams)
    chosen, rejected = split_texts(pairs["train"])
    words.fit(chosen + rejected)
    train_chosen, train_rejected = words.transform(chosen), words.transform(rejected)
    test_chosen, test_rejected = (words.transform(texts) for texts in split_texts(pairs["test"]))

    labels = np.repeat([1, 0], len(chosen))
    alone = LogisticRegression(max_iter=1000).fit(scipy.sparse.vstack([train_chosen, train_rejected]), labels)
    scores = alone.decision_function(test_chosen) - alone.decision_function(test_rejected)
    assert preference_accuracy(scores) <= 0.6
    assert (alone.predict(test_chosen).mean() + 1 - alone.predict(test_rejected).mean()) / 2 <= 0.6

    differences = train_chosen - train_rejected
    between = LogisticRegression(max_iter=1000, fit_intercept=False)
    between.fit(scipy.sparse.vstack([differences, -differences]), labels)
    assert preference_accuracy(between.decision_function(test_chosen - test_rejected)) <= 0.6


def split_texts(of_split: list[Pair]) -> tuple[list[str], list[str]]:
    return [chosen for _, chosen, _ in of_split], [rejected for _, _, rejected in of_split]


def preference_accuracy(scores: np.ndarray) -> float:
    """Share of positive scores; a tie, up to rounding, counts one half."""
    return float(np.mean(scores > 1e-9) + np.mean(np.abs(scores) <= 1e-9) / 2)


def test_words_shared_with_the_question_are_not_enough(pairs: dict[str, list[Pair]]) -> None:
    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    scores = [
        len(words(prompt[-1]["content"]) & words(chosen)) - len(words(prompt[-1]["content"]) & words(rejected))
        for prompt, chosen, rejected in pairs["test"]
    ]
    assert preference_accuracy(np.array(scores)) < 0.8


def test_the_sums_are_right(pairs: dict[str, list[Pair]]) -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__truediv__}
    sums = [
        match.groups()
        for of_split in pairs.values()
        for _, chosen, _ in of_split
        for match in re.finditer(r"(\d+) ([-+x/]) (\d+) = (\d+)", chosen)
    ]
    assert len(sums) > 20
    for left, sign, right, result in sums:
        assert operations[sign](int(left), int(right)) == int(result), f"{left} {sign} {right}"


def test_texts_are_tidy(pairs: dict[str, list[Pair]]) -> None:
    for of_split in pairs.values():
        for prompt, chosen, _ in of_split:
            for text in (*(message["content"] for message in prompt), chosen):
                assert "  " not in text
                assert "{" not in text
                assert text[-1] in ".?!'"
