import math
import random
from collections import Counter

import pytest

from tandem.data import select
from tandem.data.select import Selection

NAN = math.nan


def by_hand(scores, lengths, selection: Selection, near: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """All that is allowed, by plain loops, the widest margin first. Written without looking at `select`."""
    known = {i: s for i, s in enumerate(scores) if isinstance(s, float) and s == s}
    table = []
    for i in known:
        for j in known:
            if i == j or (i, j) in near or known[i] - known[j] <= 0 or known[i] - known[j] <= selection.min_margin:
                continue
            short, long = min(lengths[i], lengths[j]), max(lengths[i], lengths[j])
            if selection.max_length_ratio is not None and long > selection.max_length_ratio * short:
                continue
            table.append((known[i] - known[j], -i, -j))
    table.sort(reverse=True)
    return [(-i, -j) for _, i, j in table]


def table(noise: random.Random):
    """Scores in steps of ¼, so that ties and equal margins are common, and margins exact; some are missing."""
    count = noise.choice([0, 1, 1, 2, 3, 4, 5, 8])
    scores = [noise.choice([None, NAN]) if noise.random() < 0.2 else noise.randrange(8) / 4 for _ in range(count)]
    lengths = [2 ** noise.randrange(6) if noise.random() < 0.95 else 0 for _ in range(count)]
    near = {(i, j) for i in range(count) for j in range(i) if noise.random() < 0.15}
    return scores, lengths, near | {(j, i) for i, j in near}


def test_a_thousand_tables():
    noise = random.Random(5)
    ends: Counter[str] = Counter()
    for number in range(1000):
        scores, lengths, near = table(noise)
        selection = Selection(
            noise.choice(select.STRATEGIES),
            noise.choice([0.0, 0.25, 0.5, 1.0]),
            noise.choice([1, 2, 3, 100]),
            noise.choice([None, 1.0, 2.0, 4.0]),
        )
        allowed = by_hand(scores, lengths, selection, near)
        pairs, why = select.select(scores, lengths, selection, str(number), lambda i, j, near=near: (i, j) in near)
        if selection.strategy == select.BEST_WORST:
            assert pairs == allowed[:1]
        elif selection.strategy == select.ALL:
            assert pairs == allowed[: selection.max_pairs]
        else:
            best = min((i for i, _ in allowed), key=lambda i: (-scores[i], i), default=None)
            of_best = {pair for pair in allowed if pair[0] == best}
            assert set(pairs) <= of_best
            assert len(set(pairs)) == len(pairs) == min(len(of_best), selection.max_pairs)
        assert (why is None) == bool(pairs) == bool(allowed)
        ends[why or "pairs"] += 1
    assert set(ends) == {"pairs", *select.REASONS}
    assert ends["pairs"] > 300


@pytest.mark.parametrize(
    ("scores", "lengths", "selection", "reason"),
    [
        ([], [], Selection(), "fewer_than_two_scored"),
        ([3.0], [4], Selection(), "fewer_than_two_scored"),
        ([3.0, None, NAN, math.inf], [4, 4, 4, 4], Selection(), "fewer_than_two_scored"),
        ([1.0, 1.0, 1.0], [4, 4, 4], Selection(), "tied"),
        ([1.0, 0.5], [4, 4], Selection(min_margin=0.5), "margin"),
        ([1.0, 0.5], [4, 9], Selection(max_length_ratio=2.0), "length_ratio"),
        ([1.0, 0.5], [9, 4], Selection(max_length_ratio=2.0), "length_ratio"),
        ([1.0, 0.5], [0, 4], Selection(max_length_ratio=2.0), "length_ratio"),
    ],
)
def test_why_a_prompt_gives_no_pair(scores, lengths, selection, reason):
    assert select.select(scores, lengths, selection, "") == ([], reason)


def test_near_duplicates_give_way_to_the_next_widest_margin():
    scores, lengths = [4.0, 1.0, 2.0], [5, 5, 5]
    assert select.select(scores, lengths, Selection(), "") == ([(0, 1)], None)
    assert select.select(scores, lengths, Selection(), "", lambda *pair: set(pair) == {0, 1}) == ([(0, 2)], None)
    assert select.select(scores, lengths, Selection(), "", lambda *pair: True) == ([], "near_duplicates")


def test_best_random_draws_every_other_answer_and_repeats_itself():
    selection = Selection(select.BEST_RANDOM)
    scores, lengths = [1.0, 5.0, 2.0, 3.0], [1, 1, 1, 1]
    drawn = [select.select(scores, lengths, selection, str(seed))[0][0] for seed in range(60)]
    assert Counter(chosen for chosen, _ in drawn) == {1: 60}
    assert set(Counter(rejected for _, rejected in drawn)) == {0, 2, 3}
    assert min(Counter(rejected for _, rejected in drawn).values()) >= 8
    again = [select.select(scores, lengths, selection, str(seed))[0][0] for seed in range(60)]
    assert again == drawn
