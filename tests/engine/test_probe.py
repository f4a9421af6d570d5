import json

import pytest
import torch

from tandem.engine.layout import lay_out_pairs
from tandem.engine.precision import tolerance
from tandem.engine.probe import ProbeCache, difference, length_for, probe_batch
from tests.engine.tiny_models import VOCABULARY, tiny_model


def test_the_pairs_share_a_prompt_and_outgrow_a_small_window():
    model = tiny_model("Mistral", sliding_window=40)
    batch = probe_batch(model, torch.arange(3, VOCABULARY), length_for(model, 10))
    plan = lay_out_pairs(**batch)
    assert batch["input_ids"].shape == (4, 80)
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert lengths == [80, 42, 60, 80]
    prompts = [(row == -100).long().argmin().item() for row in batch["labels"]]
    assert prompts == [40, 26, 40, 26]
    assert plan.n_tokens < sum(lengths) and plan.max_k == 80
    assert all(row[:length].min() >= 3 for row, length in zip(batch["input_ids"], lengths, strict=True))


def test_the_rows_fit_the_model():
    assert length_for(tiny_model("GPT2", n_positions=32), 20) == 32
    assert length_for(tiny_model("Mistral", sliding_window=4096), 20) == 160
    assert length_for(tiny_model("Llama"), 0) == length_for(tiny_model("Llama"), 48) == 48


def test_the_rows_are_as_long_as_the_batches():
    model = tiny_model("Llama", max_position_embeddings=20_000)
    lengths = {longest: length_for(model, longest) for longest in range(1, 20_000)}
    assert all(longest <= length <= max(48, 1.25 * longest + 16) for longest, length in lengths.items())
    assert len(set(lengths.values())) < 50
    assert length_for(tiny_model("Llama", max_position_embeddings=256), 1000) == 256


def test_the_pairs_hold_ordinary_words_of_the_batch():
    model = tiny_model("Llama")  # pads with 0, begins with 1, ends with 2
    assert set(probe_batch(model, torch.tensor([[0, 0, 1], [7, 9, 2]]), 48)["input_ids"].unique().tolist()) == {7, 9}
    assert probe_batch(model, torch.tensor([[0, 0]]), 48)["input_ids"].unique().tolist() == [0]


def test_the_difference_by_hand():
    labels = torch.tensor([[-100, 5, 5, -100]])
    padded = torch.tensor([[-2.0, -4.0, -99.0]])
    assert difference(padded, torch.tensor([[-2.3, -4.0, 0.0]]), labels) == pytest.approx(0.15 / 3)
    assert difference(padded / 10, torch.tensor([[-0.2, -0.3, 0.0]]), labels) == pytest.approx(0.05)
    assert difference(padded, padded * float("nan"), labels) != difference(padded, padded, labels) == 0


def test_a_fault_of_the_last_tokens_does_not_drown():
    labels = torch.full((1, 1025), 5)
    padded, ours = torch.full((1, 1024), -1.0), torch.full((1, 1024), -1.0)
    ours[0, 1008:] = -1.5
    assert difference(padded, ours, labels) == pytest.approx(0.5 * 16 / 64)


def test_half_precision_is_allowed_more():
    assert tolerance(torch.float32) < tolerance(torch.float16) < tolerance(torch.bfloat16)
    assert tolerance(torch.float8_e4m3fn) == tolerance(torch.bfloat16)


def test_the_cache_knows_what_it_measured(tmp_path):
    cache = ProbeCache(tmp_path / "new")
    key = cache.key(tiny_model("Llama"), layout="shared")
    assert cache.read(key) is None
    cache.write(key, 1e-7)
    assert cache.read(key) == 1e-7
    assert cache.key(tiny_model("Llama", seed=1), layout="shared") == key  # weights do not matter
    others = [
        cache.key(tiny_model("Llama"), layout="packed"),
        cache.key(tiny_model("Llama", rope_theta=5.0), layout="shared"),
        cache.key(tiny_model("Qwen2"), layout="shared"),
    ]
    assert len({key, *others}) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"difference": None})])
def test_a_broken_file_is_no_answer(tmp_path, content):
    cache = ProbeCache(tmp_path)
    (tmp_path / "key.json").write_text(content)
    assert cache.read("key") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    ProbeCache(tmp_path / "file" / "below").write("key", 0.1)
