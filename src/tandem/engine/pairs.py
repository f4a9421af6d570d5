"""A batch of pairs as tensors, and sums over it: pure torch, the same on every device."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from tandem.engine.layout import IGNORED_LABEL, PAIR_LAYOUT, Layout, lay_out_pairs

if TYPE_CHECKING:
    from datasets import Dataset


ROW = "row"
"""Name, in a batch, of the places of its pairs' rows."""
_TRAINED_BY = {"weight": 1.0, "margin": 0.0}  # columns of numbers, and the one that changes nothing


def longest_row(pairs: "Dataset", max_length: int | None) -> int:
    """Tokens of the longest row that `PairCollator` makes of tokenized pairs, counted without reading a token."""
    table = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow")[:]
    prompt, chosen, rejected = (pc.list_value_length(column) for column in table.columns)
    longest = pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py() or 0
    return min(longest, max_length or longest)


@dataclass
class PairCollator:
    """Tokenized pairs (`data.tokenized.tokenize_pair`, with `pair_id`) → the batch that TRL 1.16's DPOTrainer takes.

    An example is a pair, or a list of those that are one row of the data (several rejected answers to a prompt). Rows
    are chosen, then rejected; the end of what is longer than `max_length` is cut. Keys: `input_ids`, `attention_mask`,
    `completion_mask`, (2B, S) int64; `ref_chosen_logps`, `ref_rejected_logps`, (B,) float32, where the pairs have them;
    `pair_id`, a list; `weight`, (B,) float32, where any is not 1, and `margin`, where any is not 0; `row`, a list of B
    places of the pairs' rows among `examples`, where any has several pairs; `pair_layout`, the engine's `PairLayout` of
    the batch, with a `layout` that has one.

    Attributes:
        pad_token_id: what fills rows up on the right.
        max_length: longest row, None for no limit.
        static: make every row `max_length` long, whatever the pairs.
        multiple: make rows a multiple of this long, and no longer than `max_length`: few lengths instead of many.
        size: make every batch this many pairs, copies of its first one filling it up, and add `pair_weights`, (B,)
            float32: 0 for a copy, else 1.
        layout: add the places of this layout. Where it is made here, in a data loader's worker, no step waits for it.
    """

    pad_token_id: int
    max_length: int | None
    static: bool = False
    multiple: int = 1
    size: int | None = None
    layout: Layout = "padded"

    def __call__(self, examples: Sequence[dict[str, Any] | list[dict[str, Any]]]) -> dict[str, Any]:
        of_rows = [example if isinstance(example, list) else [example] for example in examples]
        groups = [place for place, pairs in enumerate(of_rows) for _ in pairs]
        pairs = [pair for of_row in of_rows for pair in of_row]
        filled = [*pairs, *[pairs[0]] * ((self.size or 0) - len(pairs))]
        rows = [
            ((pair["prompt_ids"] + pair[f"{side}_ids"])[: self.max_length], completion_mask(pair, side))
            for side in ("chosen", "rejected")
            for pair in filled
        ]
        batch = _padded(rows, self.pad_token_id, self._width(max(len(ids) for ids, _ in rows)))
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in filled[0]:
                batch[name] = torch.tensor([pair[name] for pair in filled])
        for name, usual in _TRAINED_BY.items():
            if any(pair.get(name, usual) != usual for pair in filled):
                batch[name] = torch.tensor([pair[name] for pair in filled], dtype=torch.float32)
        if len(pairs) > len(of_rows):
            batch[ROW] = groups
        if self.size is not None:
            batch["pair_weights"] = (torch.arange(len(filled)) < len(pairs)).float()
        if self.layout != "padded":
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)
            with contextlib.suppress(ValueError):  # the engine will say why it cannot serve this batch
                batch[PAIR_LAYOUT] = lay_out_pairs(
                    batch["input_ids"], batch["attention_mask"], labels, self.layout, batch.get(ROW)
                )
        return batch | {"pair_id": [pair.get("pair_id") for pair in filled]}

    def _width(self, longest: int) -> int:
        if self.max_length is None:
            return round_up(longest, self.multiple)
        return self.max_length if self.static else min(round_up(longest, self.multiple), self.max_length)


@dataclass
class ExampleCollator:
    """Tokenized examples of SFT → batches.

    An example has `input_ids`, and `labels` that are `IGNORED_LABEL` at what is not trained; a row of several, with
    their `seq_lengths`, is taken apart again. Keys: `input_ids`, `attention_mask`, `labels`, (rows, S) int64, and
    `pair_layout`, the engine's `PairLayout` of the batch, with a `layout` that has one.

    Attributes:
        pad_token_id: what fills rows up on the right.
        max_length: longest row.
        size: make every batch this many rows of `max_length`, whatever the examples; rows without labels fill it up.
        layout: `packed` to add the places.
    """

    pad_token_id: int
    max_length: int
    size: int | None = None
    layout: Layout = "padded"

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        own = unpacked(examples)
        filled = [*own, *[{"input_ids": [self.pad_token_id], "labels": []}] * ((self.size or 0) - len(own))]
        rows = [
            (row["input_ids"][: self.max_length], [label != IGNORED_LABEL for label in row["labels"]]) for row in filled
        ]
        width = self.max_length if self.size is not None else max(len(ids) for ids, _ in rows)
        batch = _padded(rows, self.pad_token_id, width)
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, IGNORED_LABEL)
        batch["labels"][len(own) :] = IGNORED_LABEL
        batch["labels"][:, 0] = IGNORED_LABEL  # which nothing predicts
        if self.layout != "padded":
            batch[PAIR_LAYOUT] = lay_out_pairs(
                batch["input_ids"], batch["attention_mask"], batch["labels"], self.layout
            )
        return batch


def unpacked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    """The examples of packed rows, in their order; other rows as they are."""
    examples = []
    for row in rows:
        end = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            start, end = end, end + length
            examples.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    return examples


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below `length`."""
    return -(-length // multiple) * multiple


def completion_mask(pair: Mapping[str, Any], side: str) -> list[int]:
    """1 at the tokens of prompt + answer that are scored: all of the answer, or what its `…_mask` says."""
    own = pair.get(f"{side}_mask") or [1] * len(pair[f"{side}_ids"])
    return [0] * len(pair["prompt_ids"]) + list(own)


def _padded(rows: Sequence[tuple[list[int], Sequence[int]]], pad_token_id: int, width: int) -> dict[str, Any]:
    """Rows of ids, each with the mask of its completion, as tensors of `width` columns."""
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
        "completion_mask": torch.zeros(len(rows), width, dtype=torch.int64),
    }
    for row, (ids, mask) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        scored = torch.tensor(mask[: len(ids)], dtype=torch.int64)
        batch["completion_mask"][row, : len(scored)] = scored
    return batch


def completion_logps(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> Tensor:
    """Log-prob of each completion token, from the logits of a padded forward, in float32.

    One shape in, one shape out: nothing is selected, and what is no completion is multiplied by zero.

    Args:
        logits: (N, S, V).
        input_ids: (N, S) int64.
        completion_mask: (N, S), 1 at completion tokens.

    Returns:
        (N, S − 1) nats; zero outside of completions.
    """
    predicting = logits[:, :-1].float()
    targets = input_ids[:, 1:, None]
    logps = predicting.gather(-1, targets).squeeze(-1) - predicting.logsumexp(-1)
    return logps * completion_mask[:, 1:]


def sequence_logps(per_token: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-prob of each answer, as TRL sums it.

    Args:
        per_token: (2B, S − 1) log-probs in nats, zero outside of completions; chosen rows, then rejected.
        completion_mask: (2B, S − 1), 1 at completion tokens.
        ld_alpha: weight of the tokens beyond the shorter answer's length (LD-DPO, Liu et al. 2024, Eq. 8), or None.

    Returns:
        (2B,) nats.
    """
    if ld_alpha is None:
        return per_token.sum(1)
    lengths = completion_mask.sum(1)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    beyond = completion_mask.cumsum(1) > shorter[:, None]
    # Summed in TRL's order, so that policy and reference are equal to the last bit where they are the same model
    return (per_token * ~beyond).sum(1) + ld_alpha * (per_token * beyond).sum(1)
