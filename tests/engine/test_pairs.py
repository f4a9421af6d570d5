"""Batches of pairs and sums over them, beside TRL's collator and numbers by hand."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tandem.engine.layout import IGNORED_LABEL, lay_out_pairs
from tandem.engine.pairs import ExampleCollator, PairCollator, completion_logps, longest_row, sequence_logps
from tests.engine.tiny_models import random_pairs

ids = st.lists(st.integers(1, 99), min_size=1, max_size=9)
pair = st.fixed_dictionaries(
    {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids, "pair_id": st.text(max_size=3)}
)


@given(st.lists(pair, min_size=1, max_size=5), st.integers(2, 20), st.booleans())
def test_the_batch_is_trls(pairs: list[dict], max_length: int, scored: bool):
    if scored:
        pairs = [p | {"ref_chosen_logps": float(i), "ref_rejected_logps": -float(i)} for i, p in enumerate(pairs)]
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=max_length)(pairs)
    ours = PairCollator(0, max_length)(pairs)
    assert ours.pop("pair_id") == [p["pair_id"] for p in pairs]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@settings(max_examples=30)
@given(st.lists(pair, min_size=1, max_size=5), st.one_of(st.none(), st.integers(2, 20)))
def test_the_longest_row_is_the_collators(pairs: list[dict], max_length: int | None):
    expected = PairCollator(0, max_length)(pairs)["input_ids"].shape[1]
    assert longest_row(Dataset.from_list(pairs), max_length) == expected
    assert (
        longest_row(Dataset.from_list(pairs).select([0, 0]), None)
        == PairCollator(0, None)(pairs[:1])["input_ids"].shape[1]
    )


@given(st.lists(pair, min_size=1, max_size=4), st.integers(10, 20))
def test_a_static_batch_holds_the_same_and_nothing_that_counts(pairs: list[dict], max_length: int):
    plain, static = PairCollator(0, max_length)(pairs), PairCollator(0, max_length, static=True, size=4)(pairs)
    count, width = len(pairs), plain["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert static[name].shape == (8, max_length)
        real = torch.cat([static[name][:count], static[name][4 : 4 + count]])
        assert torch.equal(real[:, :width], plain[name])
        assert not real[:, width:].any()
    assert static["pair_weights"].tolist() == [1.0] * count + [0.0] * (4 - count)
    assert static["pair_id"] == [p["pair_id"] for p in [*pairs, *[pairs[0]] * (4 - count)]]


@given(st.lists(pair, min_size=1, max_size=4), st.integers(1, 8), st.none() | st.integers(10, 20))
def test_rows_to_a_multiple_hold_the_same(pairs: list[dict], multiple: int, max_length: int | None):
    plain, rounded = PairCollator(0, max_length)(pairs), PairCollator(0, max_length, multiple=multiple)(pairs)
    longest, width = plain["input_ids"].shape[1], rounded["input_ids"].shape[1]
    assert longest <= width < longest + multiple
    assert width % multiple == 0 or width == max_length
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(rounded[name][:, :longest], plain[name])
        assert not rounded[name][:, longest:].any()


def test_examples_have_one_shape_and_labels_on_completions():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [IGNORED_LABEL, IGNORED_LABEL, 7, 8]}]
    batch = ExampleCollator(pad_token_id=0, max_length=5, size=2)(rows)
    blank = IGNORED_LABEL
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [0] * 5]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]  # a row of nothing but padding is NaN
    assert batch["labels"].tolist() == [[blank, blank, 7, 8, blank], [blank] * 5]
    cut = ExampleCollator(pad_token_id=0, max_length=3, size=1)(rows)
    assert cut["labels"].tolist() == [[blank, blank, 7]]


def test_completion_logps_by_hand():
    """Two words. Logits (0, log 3) give them 1/4 and 3/4; the first completion token is predicted by the prompt."""
    logits = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).expand(1, 4, 2)
    ids, mask = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 1, 1, 0]])
    logps = completion_logps(logits, ids, mask)
    assert torch.allclose(logps, torch.tensor([[0.75, 0.25, 1.0]]).log())


def test_sequence_logps_by_hand():
    """Chosen has 3 tokens, rejected 1; beyond the shorter one's length a token weighs ld_alpha."""
    per_token = torch.tensor([[-1.0, -2.0, -4.0], [0.0, -8.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    assert sequence_logps(per_token, mask, None).tolist() == [-7.0, -8.0]
    assert sequence_logps(per_token, mask, 0.5).tolist() == [-1 - 1 - 2, -8.0]
    assert sequence_logps(per_token, mask, 0.0).tolist() == [-1.0, -8.0]


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_the_plan_of_a_batch_is_made_in_a_loaders_worker(layout):
    pairs = random_pairs(5)
    loader = DataLoader(pairs, batch_size=3, num_workers=1, collate_fn=PairCollator(0, 30, layout=layout))
    for batch in loader:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        here = lay_out_pairs(batch["input_ids"], batch["attention_mask"], labels, layout)
        assert torch.equal(batch["pair_layout"].indices, here.indices)
        assert batch["pair_layout"].segments == here.segments and batch["pair_layout"].shape == here.shape


def test_a_batch_without_a_token_has_no_plan():
    empty = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    assert "pair_layout" not in PairCollator(0, 30, layout="shared")([empty])
    assert "pair_layout" not in PairCollator(0, 30)(random_pairs(1))
