"""KL of a round from round 0, against log-probabilities of plain transformers, one answer at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.models.scorer import Scorer
from tandem.rounds.measure import measure
from tandem.rounds.options import RoundsOptions
from tests import tiny

TEXTS = [" ".join(tiny.WORDS[index : index + 2 + index % 3]) for index in range(6)]


def write(run: Path, number: int, model: Path, adapter: Path | None, **more: Any) -> None:
    folder = run / f"round_{number}" / "held_out"
    folder.mkdir(parents=True)
    drawn = {"model": str(model), "adapter": adapter and str(adapter), "dtype": "float32", "engine": "transformers"}
    rows = [
        {"prompt": f"say {text}", "text": text, "score": float(index), "scorer": "f", "non_answer": None, **drawn}
        for index, text in enumerate(TEXTS)
    ]
    rows.append({"prompt": "say", "text": "cut", "score": None, "scorer": None, "non_answer": "cut_off", **drawn})
    (folder / "scores.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in rows))


def by_hand(model: Any, tokenizer: Any) -> list[float]:
    """Log-prob of each answer and its end."""
    sums = []
    for text in TEXTS:
        turns = [{"role": "user", "content": f"say {text}"}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt["input_ids"] + answer])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)
        places = range(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
        sums.append(sum(logps[at, token].item() for at, token in zip(places, answer, strict=True)))
    return sums


def test_answers_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, 0, tiny.save_model(tmp_path / "model"), None)
    write(tmp_path, 1, tmp_path / "model", None)
    sizes: set[int] = set()
    token_logps = Scorer._token_logps

    def watched(self: Scorer, batch: dict[str, Any]) -> Any:
        sizes.add(len(batch["input_ids"]))
        return token_logps(self, batch)

    monkeypatch.setattr(Scorer, "_token_logps", watched)
    measure(RoundsOptions(run_dir=str(tmp_path), kl_batch_size=4))
    assert sizes == {8, 4}  # two rows a pair, six answers


def test_the_mean_log_ratio_per_answer_and_per_token(tmp_path: Path):
    model = tmp_path / "model"
    tiny.save_model(model, tied=False)
    adapter = tiny.save_adapter(tmp_path / "adapter", model)
    write(tmp_path, 0, model, None)
    write(tmp_path, 1, model, adapter)
    write(tmp_path, 2, model, None)
    options = RoundsOptions(run_dir=str(tmp_path), kl_batch_size=4)
    first, second, third = measure(options)["rounds"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = by_hand(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).eval()
    ratios = np.array(by_hand(tuned, tokenizer)) - np.array(base)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS]
    assert first["kl"] is None
    assert abs(ratios).max() > 0.01
    assert second["kl"]["per_answer"]["value"] == pytest.approx(ratios.mean(), abs=1e-4)
    assert second["kl"]["per_token"]["value"] == pytest.approx(ratios.sum() / sum(lengths), abs=1e-4)
    assert second["kl"]["per_answer"]["n"] == len(TEXTS)  # the answer that was cut off is in none
    assert third["kl"]["per_answer"]["value"] == pytest.approx(0, abs=1e-4)

    shutil.move(adapter, tmp_path / "elsewhere")  # what was computed is kept, and other settings compute anew
    assert measure(options)["rounds"][1]["kl"] == second["kl"]
    few = measure(RoundsOptions(run_dir=str(tmp_path), kl_prompts=2))["rounds"]
    assert few[1]["kl"]["per_answer"] is None
    assert str(adapter) in few[1]["kl"]["why"]
    assert "KL:" in (tmp_path / "rounds.html").read_text()
    assert few[2]["kl"]["per_answer"]["n"] == 2
    assert measure(RoundsOptions(run_dir=str(tmp_path), kl_prompts=0))["rounds"][1]["kl"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine": "openai"}, "a server drew the answers"),
        ({"non_answer": "empty", "text": ""}, "no whole answer"),
    ],
)
def test_what_has_no_kl(tmp_path: Path, more: dict[str, Any], said: str):
    write(tmp_path, 0, tmp_path, None)
    write(tmp_path, 1, tmp_path, None, **more)
    row = measure(RoundsOptions(run_dir=str(tmp_path)))["rounds"][1]
    assert said in row["kl"]["why"]
