"""The six checks of a newcomer: `python -m tests.sanity [MODEL]`, a tiny random model when none is named.

Data, tokenisation, forward, loss, one training step, checkpoint: a line each, `ok` or `failed`. Exit code 1 if one
fails.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.options import DataOptions
from tandem.data.sample import sample_path
from tandem.data.sources import load_splits
from tandem.data.texts import render, tokenize_pair
from tandem.models.load import load_model, load_tokenizer
from tandem.models.scorer import Scorer
from tandem.monitor.options import MonitorOptions
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import EngineOptions, GaudiOptions, TrainOptions
from tandem.runs import is_complete
from tandem.training.option_sets import DPOOptionSet
from tests import tiny

PAIRS = 4


class Checks:
    """One check a method, in order: each returns what it saw, or raises. Later ones use what earlier ones made."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.data = DataOptions(str(sample_path("train").parent), dataset_train_split=f"train[:{PAIRS}]")

    def data_(self) -> str:
        train, held_out = load_splits(self.data)
        assert len(train) == PAIRS
        self.rows = [render(pair, use_chat_template=True) for pair in train]
        assert all(row["chosen"] != row["rejected"] for row in self.rows)
        return f"{len(train)} training and {len(held_out)} held-out pairs"

    def tokenisation(self) -> str:
        self.tokenizer = load_tokenizer(ModelOptions(self.model))
        self.pairs = [tokenize_pair(row, self.tokenizer) for row in self.rows]
        for row, pair in zip(self.rows, self.pairs, strict=True):
            assert row["prompt"][-1]["content"] in self.tokenizer.decode(pair["prompt_ids"])
            for side in ("chosen", "rejected"):
                assert row[side][0]["content"] in self.tokenizer.decode(pair[f"{side}_ids"])
        tokens = sum(len(pair["prompt_ids"]) for pair in self.pairs) / PAIRS
        return f"texts come back from their tokens; {tokens:.0f} tokens in a prompt"

    def forward(self) -> str:
        self.before = self._log_probs(self.model)
        assert np.isfinite(self.before).all()
        assert (self.before < 0).all()
        return f"log-prob of a chosen answer {self.before[:, 0].mean():.1f} nats"

    def loss(self) -> str:
        self._train()
        metrics = json.loads((self.folder / "run" / "training_metrics.json").read_text())
        first = metrics["log_history"][0]["loss"]
        assert abs(first - math.log(2)) < 1e-3, f"the first DPO loss is {first}, not ln 2"
        return f"first DPO loss {first:.4f} = ln 2"

    def training_step(self) -> str:
        self.after = self._log_probs(str(self.folder / "run"))
        margins = (self.after - self.before) @ [1.0, -1.0]
        assert np.abs(margins).max() > 0
        assert margins.mean() > 0, f"one step moved the mean margin down, to {margins.mean():.4f}"
        return f"one step raised the mean margin from 0 to {margins.mean():.4f}"

    def checkpoint(self) -> str:
        saved = self.folder / "run" / "checkpoint-1"
        assert is_complete(saved), f"{saved} is not complete"
        difference = np.abs(self._log_probs(str(saved)) - self.after).max()
        assert difference == 0, f"the checkpoint's log-probs differ by {difference}"
        return "saved, loaded again, and the same to the last bit"

    def _log_probs(self, model: str) -> np.ndarray:
        scorer = Scorer(load_model(ModelOptions(model)), self.tokenizer, batch_size=PAIRS, bf16=False)
        return scorer.pair_logps(self.pairs, None)

    def _train(self) -> None:
        from tandem.training.stages import run_dpo

        adapter = (Path(self.model) / "adapter_config.json").is_file()
        run = DPOOptionSet(
            ModelOptions(self.model),
            LoraOptions(use_peft=not adapter),
            TextOptions(),
            self.data,
            TrainOptions(
                str(self.folder / "run"),
                max_steps=1,
                save_steps=1,
                logging_steps=1,
                per_device_train_batch_size=PAIRS,
                learning_rate=1e-3,
                bf16=False,
            ),
            DPOOptions(),
            EngineOptions(ref_cache=str(self.folder / "reference")),
            MonitorOptions(),
            GaudiOptions(),
        )
        run_dpo(run)


def main(argv: list[str]) -> int:
    """Run the checks; the number of failed ones."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checks = Checks(argv[0] if argv else str(folder / "tiny"), folder)
        steps: dict[str, Callable[[], str]] = {
            "data": checks.data_,
            "tokenisation": checks.tokenisation,
            "forward": checks.forward,
            "loss": checks.loss,
            "one training step": checks.training_step,
            "checkpoint": checks.checkpoint,
        }
        if not argv:
            tiny.save_model(folder / "tiny")
        for title, check in steps.items():
            said, good = _quietly(check)
            failed += not good
            print(f"{title}: {'ok' if good else 'failed'}: {said}", flush=True)
    return failed


def _quietly(check: Callable[[], str]) -> tuple[str, bool]:
    noise: Any = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise):
            return check(), True
    except Exception as error:  # whatever is wrong with a model, the other checks are still worth their line
        return f"{type(error).__name__}: {' '.join(str(error).split())}", False


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
