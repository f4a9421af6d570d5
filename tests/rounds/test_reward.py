"""A reward model of random weights scores as plain transformers does, one conversation at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from tandem.errors import UserError
from tandem.rounds.reward import RewardModel
from tests import tiny

TEXTS = [
    ([{"role": "user", "content": f"say {word}"}], " ".join(tiny.WORDS[: 1 + 3 * index]))
    for index, word in enumerate(tiny.WORDS[:7])
]


def save(folder: Path, pad: str, labels: int = 1) -> Path:
    torch.manual_seed(3)
    text = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(text), hidden_size=384, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=labels,
        pad_token_id={"eos": text.eos_token_id, "none": None, "unk": text.unk_token_id}[pad],
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", ["eos", "none", "unk"])
def test_scores_are_those_of_plain_transformers_in_batches_of_any_size(tmp_path: Path, pad: str):
    folder = save(tmp_path / "reward", pad)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = []
    for messages, answer in TEXTS:
        turns = [*messages, {"role": "assistant", "content": answer}]
        encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            wanted.append(model(**encoded).logits[0, 0].item())
    assert max(wanted) - min(wanted) > 0.01
    for size in (1, 2, 3, 7, 100):
        found = {index: value for index, value, _ in RewardModel(str(folder), "float32", size).scores(TEXTS)}
        assert [found[index] for index in range(7)] == pytest.approx(wanted, abs=1e-5)


def test_what_is_longer_than_the_model_reads_has_no_score(tmp_path: Path):
    model = RewardModel(str(save(tmp_path / "reward", "eos")), "float32", 2)
    found = {index: (value, why) for index, value, why in model.scores([*TEXTS, (TEXTS[0][0], "a " * 300)])}
    assert found[7] == (None, "too_long")
    assert all(value is not None for index, (value, _) in found.items() if index < 7)


def test_models_that_are_no_reward_models(tmp_path: Path, tiny_model: Path):
    with pytest.raises(UserError, match="3 outputs"):
        RewardModel(str(save(tmp_path / "three", "eos", labels=3)), None, 1)
    with pytest.raises(UserError, match=r"is no reward model: it lacks score\.weight"):
        RewardModel(str(tiny_model), None, 1)
    with pytest.raises(UserError):
        RewardModel(str(tmp_path / "gone"), None, 1)
