"""One batch's answers: those of `generate` for each row alone, whatever cache a model has and whichever rows leave."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from tandem.models import decoding
from tandem.models.decoding import decode, growing_cache, rows_that_fit, until_end
from tandem.models.draws import RowDraws
from tandem.models.growing import CHUNK, GrowingLayer
from tandem.models.sampling import Sampling
from tests.engine.tiny_models import CONFIGS, PAD, tiny_model

NEW = 24
ENDS = set(range(40))  # so that rows end, at one token and at another


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(41, 128, (3 + 2 * row,), generator=generator).tolist() for row in range(9)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    return (
        torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    )


def alone(model: Any, row: list[int], seed: int | None) -> list[int]:
    """By the model's own `generate`, cache and all."""
    draws = [] if seed is None else [RowDraws([seed], Sampling(NEW, 1.0, 0.9), len(row))]
    ids = torch.tensor([row])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        logits_processor=draws,
    )
    return until_end(output[0, len(row) :].tolist(), ENDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_generate_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(name)
    model.generation_config = GenerationConfig(eos_token_id=sorted(ENDS))
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, given: widths.append(len((*args, given.get("input_ids"))[0])), with_kwargs=True
    )
    monkeypatch.setattr("tandem.models.growing.CHUNK", 5)  # grown several times
    rows = prompts()
    seeds = list(range(len(rows)))
    ids, mask = padded(rows)
    draws = RowDraws(seeds, Sampling(NEW, 1.0, 0.9), ids.shape[1])
    with torch.no_grad():
        together = decode(model, ids, mask, max_new_tokens=NEW, pad=PAD, draws=draws, rows_leave=True)
    leaves = growing_cache(model) is not None
    assert leaves == (name != "FalconH1")  # which has states of another kind
    assert len({len(answer) for answer in together}) > 2
    assert (min(widths) < len(rows)) == leaves
    assert together == [alone(model, row, seed) for row, seed in zip(rows, seeds, strict=True)]


def test_greedy_answers_and_rows_that_stay():
    """Where rows may not leave, all go on to the end: as many forwards as the longest answer has tokens."""
    model = tiny_model("Llama")
    model.generation_config = GenerationConfig(eos_token_id=sorted(ENDS))
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda _, args, given: forwards.append(len(given["input_ids"])), with_kwargs=True)
    rows = prompts()
    answers = {}
    for leave in (False, True):
        forwards.clear()
        answers[leave] = decode(model, *padded(rows), max_new_tokens=NEW, pad=PAD, draws=None, rows_leave=leave)
        assert len(forwards) == max(map(len, answers[leave]))
        assert (set(forwards) == {len(rows)}) != leave
    assert answers[False] == answers[True] == [alone(model, row, None) for row in rows]


def test_an_answer_that_begins_with_its_end():
    model = tiny_model("Llama")
    model.generation_config = GenerationConfig(eos_token_id=list(range(128)))
    answers = decode(model, *padded(prompts()), max_new_tokens=5, pad=PAD, draws=None, rows_leave=True)
    assert [len(answer) for answer in answers] == [1] * 9


def test_a_growing_layer_holds_what_a_copying_one_does():
    """Through all that a cache is asked for: growing, cropping, rows chosen, put in another order and repeated."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()

    def add(columns: int) -> None:
        rows = len(theirs.keys) if theirs.get_seq_length() else 4
        new = torch.randn(2, rows, 2, columns, 8, generator=generator)
        for layer in (ours, theirs):
            keys, values = layer.update(*new)
            assert keys is layer.keys
            assert values is layer.values

    for ask in (
        lambda layer: layer.crop(-3),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 1])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0])),
        lambda layer: layer.reset(),
    ):
        add(CHUNK + 3)
        add(1)
        add(1)
        for layer in (ours, theirs):
            ask(layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        add(1)
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=0)


def test_a_token_more_copies_no_cache():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 1, 2, 10, 8))
    place = layer.keys.data_ptr()
    for _ in range(CHUNK):
        layer.update(*torch.randn(2, 1, 2, 1, 8))
    assert layer.keys.data_ptr() == place
    layer.update(*torch.randn(2, 1, 2, 1, 8))
    assert layer.keys.data_ptr() != place


def test_rows_by_memory(monkeypatch: pytest.MonkeyPatch):
    """By hand for a Llama of 2 layers, 32 wide, 4 heads and 2 groups of 8, in float32."""
    model = tiny_model("Llama")
    weights = sum(weight.numel() for weight in model.parameters()) * 4
    cached = 2 * 2 * 2 * 8 * 4
    row = 30 * cached + 20 * (3 * 64 + 8 * 32) * 4 + 8 * 4 * 128
    cpu = torch.device("cpu")
    for memory, rows in ((0, 1), (weights + 4 * row * 5, 5), (weights + 4 * row * 1000, 32)):
        monkeypatch.setattr(decoding, "memory", lambda device, memory=memory: memory + 8)
        assert rows_that_fit(model, 20, 10, cpu) == rows
    assert rows_that_fit(model, 20, 10, torch.device("cuda")) == 64


def test_the_cache_is_the_one_that_generate_makes():
    """Layer by layer, but for those that grow."""
    model = tiny_model("Gemma3")
    ours, theirs = growing_cache(model), DynamicCache(config=model.config.get_text_config(decoder=True))
    kinds = [DynamicLayer if type(layer) is GrowingLayer else type(layer) for layer in ours.layers]
    assert kinds == [type(layer) for layer in theirs.layers]
    assert GrowingLayer in map(type, ours.layers)
