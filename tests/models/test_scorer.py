import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tandem.models import habana
from tandem.models.decoding import until_end
from tandem.models.load import load_model, load_tokenizer
from tandem.models.sampling import Sampling
from tandem.models.scorer import Scorer
from tandem.options.model import ModelOptions
from tests import tiny


def scorer(folder: Path, **changes: object) -> Scorer:
    source = ModelOptions(str(folder))
    return Scorer(load_model(source), load_tokenizer(source), **{"batch_size": 2, "bf16": False} | changes)


PAIRS = [
    {"prompt_ids": [3, 40, 41], "chosen_ids": [50, 51, 2], "rejected_ids": [60, 2]},
    {"prompt_ids": [3, 42], "chosen_ids": [70, 2], "rejected_ids": [71, 72, 73, 74, 2]},
    {"prompt_ids": [3], "chosen_ids": [80], "rejected_ids": [81]},
]


def test_log_probs_are_in_the_order_of_the_pairs(tiny_model: Path):
    """Batches are sorted by length inside; each pair alone must give what it gives among others."""
    together = scorer(tiny_model).pair_logps(PAIRS, None)
    alone = np.concatenate([scorer(tiny_model, batch_size=1).pair_logps([pair], None) for pair in PAIRS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for pair, row in zip(PAIRS, together, strict=True):
        for side, value in zip(("chosen_ids", "rejected_ids"), row, strict=True):
            ids = pair["prompt_ids"] + pair[side]
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(pair["prompt_ids"])
            assert value == pytest.approx(sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-5)


def test_no_pairs(tiny_model: Path):
    assert scorer(tiny_model).pair_logps([], None).shape == (0, 2)


def test_an_adapter_is_scored_with_its_adapter_on(tmp_path: Path, tiny_model: Path):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(ModelOptions(str(tiny_model))).save_pretrained(tmp_path / "merged")
    of_adapter, of_merged, of_base = (
        scorer(folder).pair_logps(PAIRS, None) for folder in (tmp_path / "adapter", tmp_path / "merged", tiny_model)
    )
    np.testing.assert_allclose(of_adapter, of_merged, atol=1e-4)
    assert np.abs(of_adapter - of_base).max() > 1e-2


def test_samples_follow_the_model(tiny_model: Path):
    """The first token of 4,000 draws at temperature 1 against the model's own probabilities."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prompt = [3, 40, 41]
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()
    answers = scorer(tiny_model).draw([prompt] * 4000, Sampling(1, 1.0, 1.0), range(4000))
    counts = np.bincount([answer[0] for answer in answers], minlength=len(probabilities))
    expected = 4000 * probabilities
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(probabilities) - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_answers_end_with_their_end(tiny_model: Path, tmp_path: Path):
    assert until_end([5, 6, 2, 7, 2], {2}) == [5, 6, 2]
    assert until_end([5, 6], {2}) == [5, 6]
    assert scorer(tiny_model).ends == {2}
    # A model may name several ends; the tokenizer's own always counts
    folder = shutil.copytree(tiny_model, tmp_path / "two_ends")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [4, 5]}))
    assert scorer(folder).ends == {2, 4, 5}


@pytest.mark.parametrize("adapter", [False, True])
def test_an_hpu_without_optimum_habana_gets_few_shapes_and_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
):
    """Rows and caches of fixed lengths, as on an HPU, on the CPU and beside the pair engine."""
    folder = tiny.save_model(tmp_path / "model", tied=False)
    if adapter:
        folder = tiny.save_adapter(tmp_path / "adapter", folder)
    plain = scorer(folder)
    monkeypatch.setattr(habana, "few_shapes", lambda: True)
    fixed = scorer(folder)
    seen = set()

    def note(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.add(tuple(kwargs["input_ids"].shape))

    base = fixed.model.get_base_model() if adapter else fixed.model
    base.model.register_forward_pre_hook(note, with_kwargs=True)
    np.testing.assert_allclose(fixed.pair_logps(PAIRS, None), plain.pair_logps(PAIRS, None), rtol=0, atol=1e-5)
    assert seen == {(4, 128)}
    seen.clear()
    prompts, greedy = [[3, 40, 41, 9], [3, 42], [5]], Sampling(8, 0.0, 1.0)
    assert fixed.draw(prompts, greedy, range(3)) == plain.draw(prompts, greedy, range(3))
    assert seen == {(4, 128), (4, 1)}
