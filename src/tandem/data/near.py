"""Near duplicates: MinHash (Broder 1997) proposes, the exact Jaccard similarity of word shingles decides."""

import re
from collections.abc import Iterable

import numpy as np
import xxhash
from datasketch import LeanMinHash, MinHash, MinHashLSH

SIMILAR = 0.8  # Jaccard similarity from which two texts are near duplicates
_SHINGLE = 3  # words
_MOST = 10_000  # the smallest shingles of a text are kept: all of most texts, a bottom-k sketch of a book
CROWD = 30  # candidates compared; beyond as many none is added, since boilerplate would cost n² comparisons
_BANDS, _ROWS = 10, 5  # texts at SIMILAR are missed in 1 - (1 - (1 - 0.8**5)**10) = 2% of cases, at 0.9 in 0.01%
_SCHEME = "affine32"
_SEED = 1
# Thai, Japanese, Chinese and Korean put no spaces between words: there, each character is one
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")


def shingles(text: str) -> np.ndarray:
    """Hashes of the runs of three words in `text`, without case and punctuation.

    Returns:
        uint32, sorted, distinct; never empty: a text of fewer words is one shingle, a text of none its characters.
    """
    words = _WORD.findall(text.lower()) or [text.strip()]
    runs = (" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))
    hashes = (xxhash.xxh32_intdigest(run.encode("utf-8", "replace")) for run in runs)
    return np.unique(np.fromiter(hashes, np.uint32))[:_MOST]


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sets given as sorted arrays of distinct values."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def signatures(sets: Iterable[np.ndarray]) -> np.ndarray:
    """MinHash signatures of sets of shingles, uint32 of shape (sets, permutations)."""
    hashes = MinHash.bulk(sets, num_perm=_BANDS * _ROWS, seed=_SEED, scheme=_SCHEME, hashfunc=int)
    return np.array([each.hashvalues for each in hashes], np.uint32).reshape(-1, _BANDS * _ROWS)


class Candidates:
    """Keys of the sets added so far, found by a signature that is probably similar."""

    def __init__(self) -> None:
        self._lsh = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))

    def add(self, key: int, signature: np.ndarray) -> None:
        """Make a set findable; each key once."""
        self._lsh.insert(key, self._minhash(signature), check_duplication=False)

    def like(self, signature: np.ndarray) -> list[int]:
        """The first CROWD keys, in ascending order, of sets that share a band with `signature`."""
        return sorted(self._lsh.query(self._minhash(signature)))[:CROWD]

    @staticmethod
    def _minhash(signature: np.ndarray) -> LeanMinHash:
        return LeanMinHash(seed=_SEED, hashvalues=signature, scheme=_SCHEME)
