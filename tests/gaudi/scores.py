"""Log-probs of pairs and greedy answers: `python scores.py WHOSE ASKED.json RESULT.json`.

WHOSE is `ours`, `tandem.models.scorer` in either environment, or `padded`: TRL 1.16's own forward of padded rows.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tandem.models.load import load_model, load_tokenizer
from tandem.models.sampling import Sampling
from tandem.models.scorer import load_scorer
from tandem.options.model import ModelOptions

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
BATCH = 4


def ours(model: str, pairs: list[dict[str, list[int]]], max_length: int) -> dict[str, Any]:
    scorer = load_scorer(model, "float32", batch_size=BATCH, bf16=False)
    prompts = [pair["prompt_ids"] for pair in pairs[:6]]
    batches = prompts[:BATCH], prompts[BATCH:]
    answers = [answer for batch in batches for answer in scorer.draw(batch, GREEDY, range(len(batch)))]
    return {"logps": scorer.pair_logps(pairs, max_length).tolist(), "answers": answers}


def padded(model: str, pairs: list[dict[str, list[int]]], max_length: int) -> dict[str, Any]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    source = ModelOptions(model, dtype="float32")
    loaded = load_model(source).eval()
    base = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
    add_fused_lm_head(base, 1.0, False, ("log_probs",))
    batch = DataCollatorForPreference(load_tokenizer(source).pad_token_id, max_length=max_length)(pairs)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    with torch.no_grad():
        scored = loaded(**batch, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    return {"logps": scored.double().sum(1).view(2, -1).T.tolist()}


if __name__ == "__main__":
    whose, asked_file, result = sys.argv[1:]
    asked = json.loads(Path(asked_file).read_text())
    score = {"ours": ours, "padded": padded}[whose]
    found = {name: score(model, asked["pairs"], asked["max_length"]) for name, model in asked["models"].items()}
    Path(result).write_text(json.dumps(found))
