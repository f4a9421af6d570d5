"""Chooses the preference pairs among a prompt's scored answers. Arithmetic on plain lists."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BEST_WORST, BEST_RANDOM, ALL = "best_worst", "best_random", "all"
STRATEGIES = (BEST_WORST, BEST_RANDOM, ALL)

# Why a prompt gives no pair: the first of the conditions, in this order, that none of its pairs meets
TOO_FEW, TIED, MARGIN, LENGTH, SIMILAR = "fewer_than_two_scored", "tied", "margin", "length_ratio", "near_duplicates"
REASONS = (TOO_FEW, TIED, MARGIN, LENGTH, SIMILAR)

Pair = tuple[int, int]  # indices of chosen and rejected


@dataclass(frozen=True)
class Selection:
    """How pairs are chosen.

    Attributes:
        strategy: `best_worst` is the pair of the widest margin; `best_random` the best answer against others drawn at
            random; `all` every pair, the widest margins first. Where the conditions below forbid a pair, the next best
            takes its place.
        min_margin: score of chosen less that of rejected must be above this, and above 0.
        max_pairs: of one prompt; `best_worst` gives one in any case.
        max_length_ratio: the longer answer is at most this many times as long as the shorter, whichever is chosen.
    """

    strategy: str = BEST_WORST
    min_margin: float = 0.0
    max_pairs: int = 1
    max_length_ratio: float | None = None


def select(
    scores: Sequence[float | None],
    lengths: Sequence[int],
    selection: Selection,
    seed: str,
    similar: Callable[[int, int], bool] = lambda one, other: False,
) -> tuple[list[Pair], str | None]:
    """The pairs of one prompt, or none and one of `REASONS`.

    Equal margins keep the order of the answers, chosen first.

    Args:
        scores: of each answer; None or NaN for one that has none
        lengths: of each answer, all in one unit
        seed: of what `best_random` draws, the prompt's id among it
        similar: whether two answers, by index, are near duplicates; asked last, since it costs most
    """
    scored = [index for index, score in enumerate(scores) if score is not None and math.isfinite(score)]
    if len(scored) < 2:
        return [], TOO_FEW
    values = [score if score is not None else math.nan for score in scores]

    def margin(pair: Pair) -> float:
        return values[pair[0]] - values[pair[1]]

    pairs = [(one, other) for one in scored for other in scored if values[one] > values[other]]
    if not pairs:
        return [], TIED
    pairs = [pair for pair in pairs if margin(pair) > selection.min_margin]
    if not pairs:
        return [], MARGIN
    limit = selection.max_length_ratio
    pairs = [pair for pair in pairs if limit is None or _within(limit, lengths[pair[0]], lengths[pair[1]])]
    if not pairs:
        return [], LENGTH
    pairs.sort(key=lambda pair: (-margin(pair), pair))
    if selection.strategy == BEST_RANDOM:
        return _best_random(pairs, values, selection.max_pairs, seed, similar)
    wanted = 1 if selection.strategy == BEST_WORST else selection.max_pairs
    found = _first(wanted, pairs, similar)
    return found, None if found else SIMILAR


def _best_random(
    pairs: Sequence[Pair], values: Sequence[float], wanted: int, seed: str, similar: Callable[[int, int], bool]
) -> tuple[list[Pair], str | None]:
    """`pairs` are all that are allowed; of the best answer that has any, so many, in a random order."""
    for best in sorted({pair[0] for pair in pairs}, key=lambda index: (-values[index], index)):
        own = sorted(pair for pair in pairs if pair[0] == best)
        random.Random(seed).shuffle(own)
        if found := _first(wanted, own, similar):
            return found, None
    return [], SIMILAR


def _first(wanted: int, pairs: Sequence[Pair], similar: Callable[[int, int], bool]) -> list[Pair]:
    return list(itertools.islice((pair for pair in pairs if not similar(*pair)), wanted))


def _within(limit: float, one: int, other: int) -> bool:
    return max(one, other) <= limit * min(one, other)
