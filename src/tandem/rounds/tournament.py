"""Which answers to a prompt are compared with each other. Arithmetic only."""

from collections.abc import Sequence


def round_robin(count: int) -> list[tuple[int, int]]:
    """Every pair of `count` answers, once."""
    return [(one, other) for one in range(count) for other in range(one + 1, count)]


def swiss_round(points: Sequence[float], met: set[frozenset[int]]) -> list[tuple[int, int]]:
    """Pairs of answers for one more round of a Swiss tournament: answers of similar points that have not met.

    An answer that is left over rests.
    """
    left = sorted(range(len(points)), key=lambda index: (-points[index], index))
    pairs = []
    while len(left) > 1:
        one = left.pop(0)
        at = next((at for at, other in enumerate(left) if frozenset((one, other)) not in met), None)
        if at is not None:
            pairs.append((one, left.pop(at)))
    return pairs
