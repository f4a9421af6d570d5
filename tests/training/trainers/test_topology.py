"""The table of what a run is, and the check of the prepared model against it."""

import dataclasses

import pytest
import torch

from tandem.errors import UserError
from tandem.training.trainers.topology import Topology

TWO = Topology(
    processes=8,
    nodes=2,
    device="cpu",
    engine="fsdp",
    offloaded=False,
    precision="weights in float32",
    pairs=4,
    accumulation=3,
)


def test_the_table():
    lines = TWO.table("pairs", reference="the policy before training").splitlines()
    assert lines[0] == "this run is"
    rows = dict(line.strip().split("  ", 1) for line in lines[1:])
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["processes"] == "8 on 2 nodes"
    assert rows["reference"] == "the policy before training"
    assert "sharded per layer over 8 processes (FSDP 2)" in rows["policy"]
    assert rows["global batch"] == "96 pairs = 4 pairs × 3 accumulation × 8 processes"


def test_ranks_with_the_same_pairs_count_once():
    run = dataclasses.replace(TWO, engine="tp", processes=2, copies=2)
    assert run.global_batch == 12
    assert run.table("pairs").endswith("12 pairs = 4 pairs × 3 accumulation × 2 processes / 2 alike")


def test_offloading_is_in_the_table():
    assert dataclasses.replace(TWO, offloaded=True).sharding().endswith("resting in host memory")


@pytest.mark.parametrize("engine", ["fsdp", "ddp", "tp", "zero2", "zero3"])
def test_a_plain_model_is_not_what_was_asked_for(engine: str):
    run = dataclasses.replace(TWO, engine=engine)
    with pytest.raises(UserError, match="but it is a plain Linear"):
        run.verify(torch.nn.Linear(2, 2))


def test_another_stage_of_zero_is_not_what_was_asked_for():
    model = torch.nn.Linear(2, 2)
    model.zero_optimization_stage = lambda: 2
    dataclasses.replace(TWO, engine="zero2").verify(model)
    with pytest.raises(UserError, match="ZeRO-3"):
        dataclasses.replace(TWO, engine="zero3").verify(model)


def test_one_process_needs_nothing():
    dataclasses.replace(TWO, engine="single", processes=1).verify(torch.nn.Linear(2, 2))
