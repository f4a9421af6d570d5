"""Which pairs a step counts, whatever dealt them."""

import math

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from tandem.monitor.gather import MicroBatch, Share, Step, assemble, grad_norm_of, to_host, without_repeats


def step_of(pair_ids: list[str]) -> Step:
    values = np.arange(4 * len(pair_ids), dtype=np.float32).reshape(4, -1)
    return Step(pair_ids, values, [(0, 0)] * len(pair_ids))


def share_of(micro_batches: list[list[str]], grad_norm: float | None = None) -> Share:
    values = [np.full((4, len(ids)), float(ids[0][1:]), np.float32) for ids in micro_batches]
    return Share(micro_batches, values, [0.0] * len(micro_batches), 0, grad_norm)


def test_to_host_and_back() -> None:
    micro_batches = [
        MicroBatch(["a", "b"], torch.arange(8.0).reshape(4, 2), torch.tensor(0.5), torch.tensor(11.0), None),
        MicroBatch(["c"], torch.arange(8.0, 12.0).reshape(4, 1), torch.tensor(0.25), torch.tensor(5.0), None),
    ]
    share = to_host(micro_batches, torch.tensor(3.0))
    assert share.pair_ids == [["a", "b"], ["c"]]
    assert [values.tolist() for values in share.values] == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8], [9], [10], [11]],
    ]
    assert (share.losses, share.tokens, share.grad_norm) == ([0.5, 0.25], 16, 3.0)
    assert to_host(micro_batches, 2.5).grad_norm == 2.5
    assert to_host([], None) == Share([], [], [], 0, None)


def test_assembled_by_micro_batch_then_rank() -> None:
    step = assemble([share_of([["p1", "p2"], ["p5"]]), share_of([["p3", "p4"], ["p6"], ["p7"]])])
    assert step.pair_ids == ["p1", "p2", "p3", "p4", "p5", "p6", "p7"]
    assert step.margins.tolist() == [1, 1, 3, 3, 5, 6, 7]
    assert step.sources == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (1, 1), (1, 2)]
    assert assemble([share_of([]), share_of([])]).margins.shape == (0,)


def test_repeats_keep_their_first_row() -> None:
    step = without_repeats(step_of(["a", "b", "a", "c"]), 0, None)
    assert step.pair_ids == ["a", "b", "c"]
    assert step.values.tolist() == [[0, 1, 3], [4, 5, 7], [8, 9, 11], [12, 13, 15]]


def test_rows_beyond_the_epoch_are_padding() -> None:
    assert without_repeats(step_of(["h", "i", "a", "b"]), 8, 10).pair_ids == ["h", "i"]
    assert without_repeats(step_of(["h", "i", "a", "b"]), 8, None).pair_ids == ["h", "i", "a", "b"]


@given(
    pairs=st.integers(1, 40),
    batch=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_accelerate_deals_every_pair_once_an_epoch(
    pairs: int, batch: int, ranks: int, accumulation: int, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(pairs).tolist()
    sampler = BatchSampler(order, batch, drop_last=False)
    dealt = [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]
    rows_before, counted = 0, []
    for first in range(0, len(dealt[0]), accumulation):
        micro_batches = [[[f"p{i}" for i in rows] for rows in own[first : first + accumulation]] for own in dealt]
        step = assemble([share_of(own) for own in micro_batches])
        counted += without_repeats(step, rows_before, pairs).pair_ids
        rows_before += len(step.pair_ids)
    assert counted == [f"p{i}" for i in order]


def test_a_gradient_norm_that_is_not_finite_wins() -> None:
    assert grad_norm_of([share_of([], 2.0), share_of([], 2.0)]) == 2.0
    assert grad_norm_of([share_of([], 2.0), share_of([], math.inf)]) == math.inf
    assert grad_norm_of([share_of([])]) is None
