"""Write the sample preference set: `python -m tandem.data.sample.generate`.

Pairs are made in twos that swap their answers: what is chosen for one question is rejected for the other. So every
answer is chosen exactly as often as it is rejected, and nothing that can be said of an answer alone (its words, its
style, its length) tells which one is preferred. Only whether it answers the question does.
"""

import json
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from random import Random
from typing import Any

from tandem.data.sample import SPLITS, sample_path
from tandem.runs import write_atomic

SEED = 20
TEST_SHARE = 0.2  # of each topic's subjects; all their questions go to the test half
SAME_SUBJECT_SHARE = 0.3  # of the subjects with several kinds of question: answers swapped between two kinds
TURNS = (1, 2, 3)
TURN_WEIGHTS = (6, 3, 1)
THANKS = ("Thanks.", "Thank you.", "Great, thanks.", "Good to know.", "I see.")

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Item:
    """One question about one subject: its wordings, and its answer."""

    subject: str
    kind: str
    ask: tuple[str, ...]
    again: tuple[str, ...]
    answer: str


def build(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """The rows of both splits, `{"chosen", "rejected"}` HH transcripts. Rows 2k and 2k+1 swap their answers."""
    rng = Random(seed)
    couples: dict[str, list[list[dict[str, str]]]] = {split: [] for split in SPLITS}
    for topic in tomllib.loads((files("tandem.data.sample") / "topics.toml").read_text("utf-8")).values():
        for split, items in _split(topic, rng).items():
            couples[split] += [_write_couple(first, second, items, rng) for first, second in _couple(items, rng)]
    for of_split in couples.values():
        rng.shuffle(of_split)
    return {split: [row for couple in couples[split] for row in couple] for split in SPLITS}


def _split(topic: dict[str, Any], rng: Random) -> dict[str, list[Item]]:
    """A topic's items by split; a subject is in one split only."""
    subjects = list(topic["subjects"])
    rng.shuffle(subjects)
    n_test = len(subjects) if topic.get("held_out") else round(TEST_SHARE * len(subjects))
    return {
        "test": [item for subject in subjects[:n_test] for item in _items(topic, subject)],
        "train": [item for subject in subjects[n_test:] for item in _items(topic, subject)],
    }


def _items(topic: dict[str, Any], subject: str) -> Iterable[Item]:
    for kind, wordings in topic["questions"].items():
        ask = tuple(wording.replace("{}", subject) for wording in wordings["ask"])
        yield Item(subject, kind, ask, tuple(wordings.get("again", ())), topic["subjects"][subject][kind])


def _couple(items: Sequence[Item], rng: Random) -> list[tuple[Item, Item]]:
    """Couple each item with one that asks another question of the same subject, or the same question of another.

    An item left over where a number is odd is not used.
    """
    couples: list[tuple[Item, Item]] = []
    of_kind: dict[str, list[Item]] = defaultdict(list)
    for group in _by_subject(items).values():
        rng.shuffle(group)
        if len(group) > 1 and rng.random() < SAME_SUBJECT_SHARE:
            couples.append((group.pop(), group.pop()))
        for item in group:
            of_kind[item.kind].append(item)
    for group in of_kind.values():
        rng.shuffle(group)
        couples += [(first, second) for first, second in zip(group[::2], group[1::2], strict=False)]
    return couples


def _by_subject(items: Iterable[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.subject].append(item)
    return groups


def _write_couple(first: Item, second: Item, items: Sequence[Item], rng: Random) -> list[dict[str, str]]:
    """The two rows of a couple; both conversations have the same number of turns."""
    turns = rng.choices(TURNS, TURN_WEIGHTS)[0]
    rows = []
    for item, other in ((first, second), (second, first)):
        prompt = _conversation(item, other, items, turns, rng)
        rows.append({"chosen": f"{prompt} {item.answer}", "rejected": f"{prompt} {other.answer}"})
    return rows


def _conversation(item: Item, other: Item, items: Sequence[Item], turns: int, rng: Random) -> str:
    """A prompt of `turns` questions that ends by asking `item`.

    Earlier turns ask something else. Where the topic has several kinds of question, the last turn names its subject
    only by "it" or "there", and a third turn before that is about the subject of `other`.
    """
    earlier: list[Item] = []
    same_subject = [i for i in items if i.subject == item.subject and i.kind not in (item.kind, other.kind)]
    follows_up = turns > 1 and bool(item.again and same_subject)
    if follows_up:
        earlier.insert(0, rng.choice(same_subject))
    while len(earlier) < turns - 1:
        used = {i.subject for i in (item, *earlier)}
        kind = earlier[0].kind if earlier else item.kind
        candidates = [i for i in items if i.kind == kind and i.subject not in used and i.answer != other.answer]
        preferred = [i for i in candidates if i.subject == other.subject]
        earlier.insert(0, rng.choice(preferred or candidates))
    text = ""
    for position, past in enumerate(earlier):
        text += f"\n\nHuman: {_asked(past, position, rng)}\n\nAssistant: {past.answer}"
    last = rng.choice(item.again) if follows_up else _asked(item, len(earlier), rng)
    return f"{text}\n\nHuman: {last}\n\nAssistant:"


def _asked(item: Item, position: int, rng: Random) -> str:
    question = rng.choice(item.ask)
    return question if position == 0 else f"{rng.choice(THANKS)} {question}"


def main() -> None:
    """Rewrite the files of both splits."""
    for split, rows in build().items():
        write_atomic(sample_path(split), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{sample_path(split)}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
