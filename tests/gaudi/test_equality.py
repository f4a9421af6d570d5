"""Five SGD steps: optimum-habana's trainer with ours, our TRL trainer, and TRL 1.16's own class, the same numbers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.gaudi.steps import Case

HERE = Path(__file__).parent
TRAINERS = ("stock", "trl", "gaudi")
Results = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tiny_model: Path, gemma: Path, main_python: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """By trainer and case."""
    folder = tmp_path_factory.mktemp("equality")
    # Short answers: a sum of 100 log-probs is rounded to 1e-5 already
    rows = [
        {"chosen": f"{row['chosen'].rsplit(' ', 2)[0]} aye", "rejected": f"{row['chosen'].rsplit(' ', 2)[0]} no."}
        for row in tiny.hh_rows(20)
    ]
    data = str(tiny.save_pairs(folder / "train.jsonl", rows))
    cases = {}
    # Larger steps on the random Gemma multiply rounding by 4 each: TRL with and without our engine part as fast
    slow = {"llama": {}, "gemma": {"learning_rate": 0.002}}
    for model, path in (("llama", tiny_model), ("gemma", gemma)):
        for lora in (False, True):
            for loss in ("sigmoid", "hinge", "ipo"):
                name = f"{model}-{'lora' if lora else 'full'}-{loss}"
                cases[name] = Case(str(path), data, str(folder / name), loss, lora, extra=slow[model])
        accumulated = Case(str(path), data, str(folder / f"{model}-1x4"), batch=1, accumulation=4, extra=slow[model])
        cases[f"{model}-1x4"] = accumulated
    for loss, extra in (
        ("robust", {"label_smoothing": 0.2}),
        ("sigmoid", {"label_smoothing": 0.2}),
        ("exo_pair", {"label_smoothing": 0.1}),
        ("nca_pair", {}),
        ("sppo_hard", {}),
        ("sigmoid", {"ld_alpha": 0.3}),
    ):
        name = "-".join(["other", loss, *extra])
        cases[name] = Case(str(tiny_model), data, str(folder / name), loss, extra=extra)
    cases["uneven"] = Case(str(tiny_model), data, str(folder / "uneven"), batch=3, extra={"max_steps": 7})
    for name, more in (("sft", {}), ("sft-1x4", {"batch": 1, "accumulation": 4})):
        cases[name] = Case(str(tiny_model), data, str(folder / name), "sft", **more)
    found: Results = {}
    for trainer in TRAINERS:
        mine = cases if trainer != "stock" else {k: v for k, v in cases.items() if not k.startswith(("sft", "other"))}
        asked = folder / f"{trainer}.json"
        asked.write_text(json.dumps({name: dataclasses.asdict(case) for name, case in mine.items()}))
        answer = folder / f"{trainer}_result.json"
        python = sys.executable if trainer == "gaudi" else main_python
        paths = os.environ["PYTHONPATH"] if trainer == "gaudi" else ""
        environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{paths}"}
        command = [python, str(HERE / "steps.py"), trainer, str(asked), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[trainer] = json.loads(answer.read_text())
    return found


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert len(one["steps"]) == len(other["steps"])
    worst = abs(one["norm"] - other["norm"])
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        real = len(theirs["margins"])  # ours has copies behind them, where a batch is not full
        values = [*zip(mine["margins"][:real], theirs["margins"], strict=True), (mine["loss"], theirs["loss"])]
        worst = max(worst, *(abs(a - b) for a, b in values))
    return worst


CASES = [
    *(f"{m}-{k}-{x}" for m in ("llama", "gemma") for k in ("full", "lora") for x in ("sigmoid", "hinge", "ipo")),
    "llama-1x4",
    "gemma-1x4",
    "uneven",
]


@pytest.mark.parametrize("case", CASES)
def test_the_three_trainers_agree(results: Results, case: str):
    gaudi = results["gaudi"][case]
    assert largest_difference(gaudi, results["stock"][case]) < 1e-5
    assert largest_difference(gaudi, results["trl"][case]) < 1e-5
    assert len(gaudi["steps"]) == {"uneven": 7}.get(case, 20 if case.endswith("1x4") else 5)
    last = [abs(margin) for margin in gaudi["steps"][-1]["margins"]]
    assert max(last) > 1e-2  # it has learnt: the steps are compared, not the start


@pytest.mark.parametrize(
    "case",
    [
        "other-robust-label_smoothing", "other-sigmoid-label_smoothing", "other-exo_pair-label_smoothing",
        "other-nca_pair", "other-sppo_hard", "other-sigmoid-ld_alpha", "sft", "sft-1x4",
    ],
)  # fmt: skip
def test_other_losses_and_sft_agree_with_our_trl_trainer(results: Results, case: str):
    assert largest_difference(results["gaudi"][case], results["trl"][case]) < 1e-5


@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_accumulation_is_a_mean(results: Results, model: str):
    """1 × 4 is 4 × 1: the same weights at the end, and each step's loss the mean of its micro-batches."""
    whole, parts = results["gaudi"][f"{model}-full-sigmoid"], results["gaudi"][f"{model}-1x4"]
    assert parts["norm"] == pytest.approx(whole["norm"], abs=1e-5)
    for step in range(5):
        mean = sum(micro["loss"] for micro in parts["steps"][4 * step : 4 * step + 4]) / 4
        assert mean == pytest.approx(whole["steps"][step]["loss"], abs=1e-5)
