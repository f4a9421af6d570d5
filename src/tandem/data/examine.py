"""Examines every pair by itself in one pass, with as many processes as there are cores."""

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tandem.data.formats import Row, prompt_id
from tandem.data.messages import answer_text
from tandem.data.near import shingles, signatures
from tandem.data.row_checks import check_row, language, texts
from tandem.data.tokens import check_seen, see, special_ids, special_texts
from tandem.options.model import TextOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 500  # pairs that a process examines at a time
ALONE = 4_000  # up to so many pairs, starting more processes takes longer than it saves


@dataclass
class Examined:
    """What a pass over n rows found.

    Attributes:
        found: finding → row → what was found there
        shingles: uint32, those of each row's prompt, chosen and rejected, end to end
        ends: int64 (3n,), where each of them ends in `shingles`
        pair_signatures, prompt_signatures: uint32 (n, permutations)
        tokens: int64 (n, 3) of prompt, chosen and rejected; −1 where they were not counted
        sizes: int64 (n, 2), characters of chosen and rejected
        languages: n codes, None where the text does not tell
        prompt_ids: n
    """

    found: dict[str, dict[int, str]]
    shingles: np.ndarray
    ends: np.ndarray
    pair_signatures: np.ndarray
    prompt_signatures: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray
    languages: list[str | None]
    prompt_ids: list[str]

    def parts(self, row: int) -> list[np.ndarray]:
        """Shingles of prompt, chosen and rejected of a row; views."""
        start = int(self.ends[3 * row - 1]) if row else 0
        ends = [int(end) for end in self.ends[3 * row : 3 * row + 3]]
        return [self.shingles[left:right] for left, right in zip([start, *ends], ends, strict=False)]


def examine(pairs: Sequence[Row], tokenizer: "PreTrainedTokenizerBase | None", text: TextOptions) -> Examined:
    """Look at every pair; without a tokenizer nothing is counted or rendered."""
    chunks = [pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or len(pairs) <= ALONE:
        reader = _Reader(tokenizer, text)
        return _merge([reader.examine(chunk) for chunk in chunks])
    with ProcessPoolExecutor(cores, initializer=_start, initargs=(tokenizer, text)) as pool:
        return _merge(list(tqdm(pool.map(_examine, chunks), total=len(chunks), desc="check", unit_scale=CHUNK)))


def _merge(parts: Sequence[Examined]) -> Examined:
    found: dict[str, dict[int, str]] = defaultdict(dict)
    ends, row, shingle = [], 0, 0
    for part in parts:
        for name, rows in part.found.items():
            found[name] |= {row + index: text for index, text in rows.items()}
        ends.append(part.ends + shingle)
        row, shingle = row + len(part.sizes), shingle + len(part.shingles)
    return Examined(
        found=dict(found),
        shingles=np.concatenate([part.shingles for part in parts]),
        ends=np.concatenate(ends),
        pair_signatures=np.concatenate([part.pair_signatures for part in parts]),
        prompt_signatures=np.concatenate([part.prompt_signatures for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        languages=[code for part in parts for code in part.languages],
        prompt_ids=[each for part in parts for each in part.prompt_ids],
    )


class _Reader:
    """What a process needs to examine pairs; made once in each."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", text: TextOptions) -> None:
        self.tokenizer, self.text = tokenizer, text
        if tokenizer is not None:
            self.special_ids, self.special_texts = special_ids(tokenizer), special_texts(tokenizer)

    def examine(self, pairs: Sequence[Row]) -> Examined:
        found: dict[str, dict[int, str]] = defaultdict(dict)
        tokens = np.full((len(pairs), 3), -1, np.int64)
        for row, pair in enumerate(pairs):
            for name, what in check_row(pair).items():
                found[name][row] = what
        if self.tokenizer is not None:
            self._examine_tokens(pairs, self.tokenizer, found, tokens)
        sets = [[shingles(part) for part in _compared(pair)] for pair in pairs]
        flat = [part for parts in sets for part in parts]
        return Examined(
            found=dict(found),
            shingles=np.concatenate(flat),
            ends=np.cumsum([len(part) for part in flat], dtype=np.int64),
            pair_signatures=signatures(np.concatenate(parts) for parts in sets),
            prompt_signatures=signatures(parts[0] for parts in sets),
            tokens=tokens,
            sizes=np.array([[len(answer_text(pair[side])) for side in ("chosen", "rejected")] for pair in pairs]),
            languages=[language(pair) for pair in pairs],
            prompt_ids=[prompt_id(pair["prompt"]) for pair in pairs],
        )

    def _examine_tokens(
        self,
        pairs: Sequence[Row],
        tokenizer: "PreTrainedTokenizerBase",
        found: dict[str, dict[int, str]],
        tokens: np.ndarray,
    ) -> None:
        for row, (pair, seen) in enumerate(zip(pairs, see(pairs, tokenizer, self.text), strict=True)):
            if isinstance(seen, str):
                found["template_refuses"][row] = seen
                continue
            tokens[row] = [len(seen.prompt_ids), len(seen.chosen_ids), len(seen.rejected_ids)]
            if seen.is_trimmed and (system := _system_of(pair)) and not _system_of(seen.row):
                found["system_cut"][row] = f"{system[:60]!r}"
            for name, what in check_seen(seen, tokenizer, self.text, self.special_ids).items():
                found[name][row] = what
            if special := next((hit for _, part in texts(pair) if (hit := self.special_texts.search(part))), None):
                found["special_tokens"][row] = special.group()


def _system_of(pair: Row) -> str:
    """The system message of a pair's prompt, or nothing."""
    prompt = pair["prompt"]
    return prompt[0]["content"] if not isinstance(prompt, str) and prompt[0]["role"] == "system" else ""


def _compared(pair: Row) -> list[str]:
    """Prompt, chosen and rejected as they are compared: without the system message, which a whole source may share."""
    prompt = pair["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(turn["content"] for turn in prompt if turn["role"] != "system")
    return [prompt, answer_text(pair["chosen"]), answer_text(pair["rejected"])]


_reader: _Reader


def _start(tokenizer: "PreTrainedTokenizerBase | None", text: TextOptions) -> None:
    global _reader
    _reader = _Reader(tokenizer, text)


def _examine(pairs: Sequence[Row]) -> Examined:
    return _reader.examine(pairs)
