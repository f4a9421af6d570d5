"""The order of a run's pairs: that of accelerate, with each step's dealt; and back again for the margins."""

import types
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from tandem.engine.balance import Cost, Dealing
from tandem.engine.lengths import PairLengths, row_lengths
from tandem.options.losses import DPOOptions, Loss
from tandem.options.training import TrainOptions
from tandem.training.dealing import Order, OrderSampler, pair_costs, why_undealt


@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.data())
@settings(deadline=None, max_examples=100)
def test_the_order_is_accelerates(
    pairs: int, ranks: int, size: int, accumulation: int, epoch: int, data: st.DataObject
):
    sampler: Any = SeedableRandomSampler(range(pairs), data_seed=7)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, size, drop_last=False)
    shards = []
    for rank in range(ranks):
        sampler.set_epoch(epoch)
        shards.append(list(BatchSamplerShard(batches, ranks, rank)))
    theirs = [pair for of_round in zip(*shards, strict=True) for batch in of_round for pair in batch]

    dealing = Dealing(ranks, accumulation, size)
    plain = Order(pairs, 7, dealing, None)
    assert [pair for step in plain.epoch(epoch) for pair in step] == theirs
    assert plain.rows == len(theirs)

    costs = np.array(data.draw(st.lists(st.integers(1, 1000), min_size=pairs, max_size=pairs)))
    dealt = Order(pairs, 7, dealing, costs)
    before = 0
    for ours, step in zip(plain.epoch(epoch), dealt.epoch(epoch), strict=True):
        assert sorted(ours) == sorted(step)
        for order in (dealt, Order(pairs, 7, dealing, costs)):  # with what it remembers, and anew
            assert [step[row] for row in order.in_order(epoch, before, len(step))] == ours
        before += len(step)


def test_the_sampler_goes_on_where_the_run_is():
    costs = np.arange(1, 41)
    order = Order(40, 0, Dealing(2, 1, 4), costs)
    second = [pair for step in order.epoch(1) for pair in step]
    resumed = list(OrderSampler(order, done=lambda: 5 + 2))  # five steps an epoch
    assert resumed[2 * 8 :] == second[2 * 8 :]
    assert len(OrderSampler(order, done=lambda: 0)) == len(resumed) == 40
    assert list(OrderSampler(order, done=lambda: 5)) == second


def test_a_step_of_another_size_is_told():
    order = Order(40, 0, Dealing(2, 1, 4), None)
    with pytest.raises(RuntimeError, match="step 2 of epoch 1 has 7 pairs, and 8 were dealt"):
        order.in_order(0, 8, 7)


LISTS = st.lists(st.integers(1, 3), max_size=8)


@given(st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=5), LISTS, LISTS), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_lengths_are_those_of_the_rows(rows: list[tuple[list[int], list[int], list[int]]]):
    pairs = Dataset.from_list(
        [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in rows]
    )
    for limit in (None, 6):
        found = PairLengths.of(pairs, limit)
        for index, (prompt, chosen, rejected) in enumerate(rows):
            one, other = (prompt + chosen)[:limit], (prompt + rejected)[:limit]
            same = [a == b for a, b in zip(one, other, strict=False)] + [False]
            shared = same.index(False)
            assert (found.chosen[index], found.rejected[index], found.shared[index]) == (len(one), len(other), shared)
            assert found.scored[index] == len(one[len(prompt) :]) + len(other[len(prompt) :])
            keys = sum(range(1, len(one) + 1)) + sum(range(shared + 1, len(other) + 1))
            assert found.keys("shared")[index] == keys
    pairs = pairs.rename_column("prompt_ids", "input_ids")
    assert row_lengths(pairs, 4).tolist() == [min(len(row[0]), 4) for row in rows]


def test_costs_follow_the_layout():
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [4, 6, 7]}]
    lengths = PairLengths.of(Dataset.from_list(rows), None)
    config = types.SimpleNamespace()  # says nothing: tokens alone
    token = Cost().per_token
    assert [pair_costs(lengths, config, layout).tolist() for layout in ("shared", "packed", "padded")] == [
        [7 * token], [11 * token], [6]
    ]  # fmt: skip


def mean_loss(chosen: float) -> Loss:
    return Loss("mine", per_pair=lambda pairs: pairs.chosen_logps)


def test_what_depends_on_a_micro_batch_stays():
    train, dense, experts = TrainOptions("out"), object(), types.SimpleNamespace(output_router_logits=False)
    assert why_undealt(train, DPOOptions(), dense) is None
    assert why_undealt(train, None, experts) is None
    experts.router_aux_loss_coef = 0.01
    assert "experts are balanced over a micro-batch" in (why_undealt(train, None, experts) or "")
    assert why_undealt(TrainOptions("out", router_aux_loss_coef=0.0), None, experts) is None
    assert why_undealt(TrainOptions("out", balance_ranks=True), DPOOptions(loss_type=["aot"]), experts) is None
    assert why_undealt(TrainOptions("out", balance_ranks=False), None, dense) == "--balance_ranks false"
    own = f"{__file__}:mean_loss"
    for losses in (["aot"], ["aot_unpaired"], ["sigmoid", "sft"], [own]):
        told = why_undealt(train, DPOOptions(loss_type=losses), dense)
        assert told and told.startswith(f"{losses[-1]} may depend on which pairs share a micro-batch")
