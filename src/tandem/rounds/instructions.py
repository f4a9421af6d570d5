"""Instructions that code can check: a set of prompts to try rounds on, and the function that scores answers to them.

    python -m tandem.rounds.instructions FOLDER    writes train.jsonl and test.jsonl

A training prompt asks for one or two of six constraints; a held-out prompt asks for two that no training prompt
combines.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import UserError, script_main
from tandem.runs import write_atomic

SEED = 20261129
TRAINED, HELD_OUT = 240, 210  # prompts

_TOPICS = (
    "a river", "winter", "bread", "a bicycle", "the moon", "a library", "tea", "a garden", "music", "a lighthouse",
    "rain", "a market", "the sea", "an old clock", "honey", "a train journey", "snow", "a bridge", "coffee", "a kite",
    "apples", "a mountain", "the night sky", "a village", "friendship", "a storm", "a harbour", "chess", "a forest",
)  # fmt: skip
_OPENERS = ("Well", "Indeed", "Today", "Perhaps", "Sure", "Listen")

# For each constraint the sentence that asks for it, with a place for its value, and the check of an answer
_WORDS = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
CONSTRAINTS: dict[str, tuple[str, Callable[[str, Any], bool]]] = {
    "lower_case": ("Write in lower case only.", lambda text, _: text == text.lower()),
    "no_comma": ("Do not use any comma.", lambda text, _: "," not in text),
    "begin_with": (
        'Begin your answer with the word "{}".',
        lambda text, word: re.match(re.escape(word) + r"\b", text, re.IGNORECASE) is not None,
    ),
    "at_most_words": ("Use at most {} words.", lambda text, most: len(_WORDS.findall(text)) <= most),
    "one_sentence": ("Answer in one sentence.", lambda text, _: len(re.findall(r"[.!?]+(?=\s|$)", text)) == 1),
    "end_with_mark": ("End your answer with an exclamation mark.", lambda text, _: text.endswith("!")),
}


def rows(count: int, *, held_out: bool, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` different prompts: `prompt`, and `constraints` with their values."""
    noise = random.Random(f"{seed} {held_out}")
    names = list(CONSTRAINTS)
    # Held-out are the pairs of neighbours in the circle of constraints, so that each constraint is in two of them
    apart = {frozenset(pair) for pair in zip(names, names[1:] + names[:1], strict=True)}
    pairs = list(itertools.combinations(names, 2))
    own: list[tuple[str, ...]] = [pair for pair in pairs if (frozenset(pair) in apart) == held_out]
    if not held_out:
        own += [(name,) for name in names]
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        given: dict[str, Any] = {}
        for name in noise.choice(own):
            given[name] = {"begin_with": noise.choice(_OPENERS), "at_most_words": noise.randrange(8, 26)}.get(name)
        sentences = [CONSTRAINTS[name][0].format(value) for name, value in given.items()]
        prompt = " ".join([f"Say something short about {noise.choice(_TOPICS)}.", *sentences])
        found.setdefault(prompt, {"prompt": prompt, "constraints": given})
    return list(found.values())


def kept(answer: str, row: Mapping[str, Any]) -> Iterator[bool]:
    """Whether `answer` keeps each constraint of its row."""
    text = answer.strip()
    for name, value in row["constraints"].items():
        yield bool(text) and CONSTRAINTS[name][1](text, value)


def success(prompt: Any, answer: str, row: Mapping[str, Any]) -> float:
    """1 if the answer keeps all constraints, else 0: for `--score_function tandem.rounds.instructions:success`."""
    return float(all(kept(answer, row)))


def share(prompt: Any, answer: str, row: Mapping[str, Any]) -> float:
    """The share of constraints that the answer keeps, which also ranks answers none of which keeps all."""
    found = list(kept(answer, row))
    return sum(found) / len(found)


def write(folder: Path) -> None:
    """Write the set as files that `data.sources` reads."""
    for name, found in (("train", rows(TRAINED, held_out=False)), ("test", rows(HELD_OUT, held_out=True))):
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("usage: python -m tandem.rounds.instructions FOLDER")
    write(Path(argv[0]))


if __name__ == "__main__":
    script_main(main)
