"""Answers to one batch of prompts by transformers' `generate`: its cache grows in place, rows leave when they end."""

from collections.abc import Collection
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tandem.devices import memory
from tandem.models.draws import RowDraws
from tandem.widths import Widths

# Rows at a time. On a CPU a token of a row of 32 costs a quarter of one of four, and 64 gain nothing (bench/RESULTS.md)
_MOST_ROWS = {"cpu": 32}
_MOST_ROWS_ELSEWHERE = 64
# Of what the weights leave of the memory: the rest is the user's own machine, or another process on the device
_SHARE = 0.25
_LEAVE = 4  # a quarter of the rows has ended: the others go on without them


def decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    max_new_tokens: int,
    pad: int,
    draws: RowDraws | None,
    rows_leave: bool,
) -> list[list[int]]:
    """What `generate` answers to each row of one batch: token ids, where its end came with that as the last.

    Args:
        ids: (rows, columns) prompts, at the right
        mask: (rows, columns) 1 where there is a prompt
        pad: what a row that has ended is filled up with
        draws: leaves one token each row; None: the most likely one
        rows_leave: rows that have ended leave the batch, by calling `generate` again for the others with their cache.
            Not where another process has to call as often.
    """
    width, ends = ids.shape[1], set(model.generation_config.eos_token_id or [])
    answers: list[list[int]] = [[] for _ in ids]
    rows = torch.arange(len(ids), device=ids.device)
    cache = growing_cache(model)
    keywords: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if draws is not None:
        keywords["logits_processor"] = LogitsProcessorList([draws])
    while len(rows):
        ended = _Ended(len(rows), ends, ids.device, leave=rows_leave and cache is not None)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=width + max_new_tokens - ids.shape[1],
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([ended]),
            **keywords,
        )
        over = ended.rows | (output.shape[1] - width >= max_new_tokens) | (not ended.leave)
        for row, answer in zip(rows[over].tolist(), output[over, width:].tolist(), strict=True):
            answers[row] = until_end(answer, ends)
        kept = (~over).nonzero()[:, 0]
        if not len(kept):
            break
        rows, ids = rows[kept], output[kept]
        mask = torch.nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache.batch_select_indices(kept)  # type: ignore[union-attr]  # who leaves has one
        if draws is not None:
            draws.keep(kept)
    return answers


def until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """`ids` up to the first of `ends`, which is kept."""
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids


class _Ended(StoppingCriteria):
    """Which rows have ended. With `leave`, `generate` stops for all of them once a quarter has.

    It asks no question of the device that `generate` does not ask itself.
    """

    def __init__(self, count: int, ends: Collection[int], device: torch.device, *, leave: bool) -> None:
        self.rows = torch.zeros(count, dtype=torch.bool, device=device)
        self.leave = leave
        self._ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)
        self._enough = max(1, count // _LEAVE) if leave else count

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.rows |= torch.isin(input_ids[:, -1], self._ends)
        return self.rows | (self.rows.sum() >= self._enough)


def growing_cache(model: PreTrainedModel) -> Any | None:
    """The cache that `generate` would make of itself, with layers that copy nothing when a token is added to them.

    None where it would make no such cache, or has layers whose rows cannot be chosen: `generate` then keeps its own.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    from tandem.models.growing import GrowingLayer

    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def rows_that_fit(model: PreTrainedModel, prompt: int, new: int, device: torch.device) -> int:
    """How many rows of `prompt` tokens and `new` more are drawn at a time, at least 1: what memory allows, to a limit.

    By the machine, not by what is free on it now: the same command draws the same batches tomorrow.
    """
    most = _MOST_ROWS.get(device.type, _MOST_ROWS_ELSEWHERE)
    widths = Widths.of(model.config.get_text_config(decoder=True))
    if widths is None:
        return most
    size = model.dtype.itemsize
    cached = 2 * widths.layers * widths.groups * widths.head * size
    passing = (3 * widths.inner + 8 * widths.hidden) * size  # of one layer at a time, while the prompts are read
    scores = 8 * 4 * widths.vocabulary  # logits in float32, probabilities and the like
    row = (prompt + new) * cached + prompt * passing + scores
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return max(1, min(most, int(_SHARE * (memory(device) - weights) / row)))
