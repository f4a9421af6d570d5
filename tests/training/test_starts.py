"""How an adapter begins: the reference is the model before, and what is saved is read as it was trained; trackers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from tandem.errors import UserError
from tandem.models.load import load_merged, load_model
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.trackers import TRACKERS
from tandem.options.training import TrainOptions
from tandem.training.stages import run_dpo
from tests import tiny
from tests.training.trainers.test_objective import run_of


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "olora"])
def test_a_start_changes_nothing_but_where_training_goes(start: str, tiny_model: Path, tmp_path: Path):
    def run(name: str, rate: float, **lora: Any) -> float:
        asked = run_of(tiny_model, tiny.hh_rows(6), tmp_path / name, {}, learning_rate=rate, max_steps=3)
        run_dpo(asked._replace(lora=LoraOptions(use_peft=True, lora_r=4, **lora)))
        log = json.loads((tmp_path / name / "training_metrics.json").read_text())["log_history"]
        assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        return float(log[2]["loss"])

    ids = torch.arange(6, 40)[None]
    run("still", 1e-12, init_lora_weights=start)
    with torch.no_grad():
        base, merged = (
            load(ModelOptions(str(folder))).eval()(ids).logits
            for load, folder in ((load_model, tiny_model), (load_merged, tmp_path / "still"))
        )
    torch.testing.assert_close(merged, base, atol=1e-4, rtol=1e-4)
    assert run("trained", 0.3, init_lora_weights=start) != run("usual", 0.3)


def test_starts_that_cannot_be():
    with pytest.raises(UserError, match="--init_lora_weights pissa changes the base, which --load_in_4bit holds"):
        LoraOptions(use_peft=True, load_in_4bit=True, init_lora_weights="pissa")
    with pytest.raises(UserError, match="needs an even --lora_r, not 5"):
        LoraOptions(use_peft=True, lora_r=5, init_lora_weights="orthogonal")


def test_trackers_are_those_of_transformers(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each is handed on: its callback is told what the run logs; one that is not installed is named beforehand."""
    callbacks = integration_utils.INTEGRATION_TO_CALLBACK
    assert set(TRACKERS) == set(callbacks)
    told: list[dict[str, float]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            told.append(logs)

    with pytest.raises(UserError, match="--report_to mlflow needs the package mlflow, which is not installed"):
        TrainOptions(output_dir="o", report_to=["mlflow"])
    monkeypatch.setitem(callbacks, "mlflow", Recorder)
    monkeypatch.setitem(TRACKERS, "mlflow", "")
    run_dpo(run_of(tiny_model, tiny.hh_rows(3), tmp_path / "out", {}, max_steps=1, report_to=["mlflow"]))
    assert any("loss" in logs for logs in told)


def test_no_limit_to_the_length(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A prompt longer than the usual limit is left out with it, and trained without."""
    rows = [{"prompt": prompt, "chosen": "b", "rejected": "c"} for prompt in ("a" * 1200, "x")]
    told = {}
    for name, limit in (("limited", 1024), ("whole", None)):
        run = run_of(tiny_model, rows, tmp_path / name / "o", {})
        run_dpo(run._replace(text=TextOptions(use_chat_template=False, max_length=limit)))
        log = json.loads((tmp_path / name / "o" / "training_metrics.json").read_text())["log_history"]
        told[name] = log[0]["num_tokens"]
        assert ("1 of 2 pairs left out" in capsys.readouterr().err) == (limit is not None)
    assert told == {"limited": 2 * 3, "whole": 2 * (3 + 1202)}
