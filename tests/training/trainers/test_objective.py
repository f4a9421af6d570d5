"""Rows of several rejected answers, weights and margins: weights and logged losses against sums by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tandem.data.options import DataOptions
from tandem.engine import forward
from tandem.errors import UserError
from tandem.models.load import load_tokenizer
from tandem.monitor.margins import read_margins_log
from tandem.monitor.options import MonitorOptions
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import EngineOptions, GaudiOptions, TrainOptions
from tandem.training.hardware import Hardware
from tandem.training.option_sets import DPOOptionSet
from tandem.training.plan import Plan
from tandem.training.preparation import training_rows
from tandem.training.stages import run_dpo
from tests import tiny

BETA, RATE = 0.3, 0.05
ROWS: list[dict[str, Any]] = [
    {"prompt": "one two", "chosen": "three four", "rejected": ["five", "three six"]},
    {"prompt": "a b c", "chosen": "d", "rejected": ["e f", "g", "d h"]},
    {"prompt": "x", "chosen": "y z", "rejected": "w"},
]
WEIGHED = [ROWS[0] | {"weight": [2.0, 0.5]}, ROWS[1] | {"weight": 0.0}, ROWS[2] | {"weight": 1.5}]
WITH_MARGINS = [ROWS[0] | {"margin": [0.5, 2.0]}, ROWS[1] | {"margin": 0.1}, ROWS[2] | {"margin": -1.0}]
BOTH = [one | two for one, two in zip(WEIGHED, WITH_MARGINS, strict=True)]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (chosen, rejected) log-ratios → the loss of a pair


def run_of(model: Path, rows: list[dict[str, Any]], out: Path, dpo: dict[str, Any], **given: Any) -> DPOOptionSet:
    out.parent.mkdir(parents=True, exist_ok=True)
    data = tiny.save_pairs(out.parent / "rows.jsonl", rows)
    layout = given.pop("layout", "shared")
    common: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": 3, "max_steps": 2, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "optim": "sgd", "bf16": False, "gradient_checkpointing": False,
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    return DPOOptionSet(
        ModelOptions(str(model)),
        LoraOptions(),
        TextOptions(use_chat_template=False, max_length=64),
        DataOptions(str(data)),
        TrainOptions(**(common | given)),
        DPOOptions(beta=BETA, **dpo),
        EngineOptions(layout=layout, ref_cache=str(out.parent / "cache")),
        MonitorOptions(),
        GaudiOptions(),
    )


def by_hand(model: Path, rows: list[dict[str, Any]], loss: Loss, sft: float = 0.0) -> tuple[Any, list[float]]:
    """Two steps of SGD on all rows, each answer forwarded alone: the weights, and the loss of each step."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    text = load_tokenizer(ModelOptions(str(model)))

    def logp(prompt: str, answer: str) -> torch.Tensor:
        asked = len(text(prompt)["input_ids"])
        ids = torch.tensor([text(prompt + answer + text.eos_token)["input_ids"]])
        logps = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return logps.gather(-1, ids[0, 1:, None])[asked - 1 :, 0]

    def pairs() -> Any:
        for row in rows:
            answers = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
            for place, answer in enumerate(answers):
                weight, margin = (
                    value[place] if isinstance(value := row.get(name, usual), list) else value
                    for name, usual in (("weight", 1.0), ("margin", 0.0))
                )
                yield logp(row["prompt"], row["chosen"]), logp(row["prompt"], answer), weight, margin

    with torch.no_grad():
        reference = [(chosen.sum(), rejected.sum()) for chosen, rejected, *_ in pairs()]
    losses = []
    for _ in range(2):
        total, tokens, nll, count = 0.0, 0, 0.0, 0
        for (chosen, rejected, weight, margin), (ref_chosen, ref_rejected) in zip(pairs(), reference, strict=True):
            total = total + weight * loss(chosen.sum() - ref_chosen - margin / BETA, rejected.sum() - ref_rejected)
            nll, tokens, count = nll - weight * chosen.sum(), tokens + len(chosen), count + 1
        step = (total + sft * nll * count / tokens) / len(rows)
        policy.zero_grad()
        step.backward()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= RATE * parameter.grad
        losses.append(step.item())
    return dict(policy.named_parameters()), losses


def sigmoid(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return -logsigmoid(BETA * (chosen - rejected))


def hinge(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - BETA * (chosen - rejected))


def apo_zero(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    return 1 - torch.sigmoid(BETA * chosen) + torch.sigmoid(BETA * rejected)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.mark.parametrize(
    ("rows", "dpo", "loss", "layout"),
    [
        (ROWS, {}, sigmoid, "shared"),
        (ROWS, {}, sigmoid, "padded"),
        (ROWS, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}, sigmoid, "shared"),
        (WEIGHED, {"loss_type": ["apo_zero"]}, apo_zero, "shared"),
        (WEIGHED, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}, sigmoid, "packed"),
        (WITH_MARGINS, {}, sigmoid, "shared"),
        (BOTH, {"loss_type": ["hinge"]}, hinge, "shared"),
    ],
)
def test_equals_a_sum_over_answers_forwarded_alone(
    rows: Any, dpo: Any, loss: Loss, layout: str, model: Path, tmp_path: Path
):
    run_dpo(run_of(model, rows, tmp_path / "out", dpo, layout=layout))
    wanted, losses = by_hand(model, rows, loss, sft=0.4 if "sft" in dpo.get("loss_type", []) else 0.0)
    trained, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", model))
    for name, weight in wanted.items():
        torch.testing.assert_close(trained[name], weight.data, atol=2e-6, rtol=1e-5)
    assert max((wanted[name] - before[name]).abs().max() for name in wanted) > 1e-3
    log = json.loads((tmp_path / "out" / "training_metrics.json").read_text())["log_history"]
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(losses, abs=2e-5)
    # Rewards are of the log-ratios, whatever margin was asked for: nothing at the first step
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    steps, _ = read_margins_log(tmp_path / "out" / "logs" / "margins")
    assert [step["pairs"] if "pairs" in step else step["n"] for step in steps] == [6, 6]


def test_two_rejected_answers_share_one_prompt(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the backbone is given: prompt and chosen once, then of each rejected answer what chosen has not."""
    counted: list[int] = []
    real = forward.PairEngine.forward

    def count(self: Any, model: Any, places: Any, **keywords: Any) -> Any:
        if model.training:
            counted.append(places.n_tokens)
        return real(self, model, places, **keywords)

    monkeypatch.setattr(forward.PairEngine, "forward", count)
    row = {"prompt": "p" * 10, "chosen": "abc", "rejected": ["abde", "xy"]}  # a token a character, and the end
    run = run_of(model, [row], tmp_path / "out", {}, per_device_train_batch_size=1, max_steps=1)
    run_dpo(run)
    # 10 + abc</s> + de</s> + xy</s>; padded, both pairs' both rows take 10 + 5
    assert counted == [10 + 4 + 3 + 3]
    alone = Hardware("cpu", 1, frozenset(), False, None, False)

    def planned(layout: Any) -> int:
        changed = run._replace(engine=EngineOptions(layout=layout))
        data = training_rows(changed, load_tokenizer(run.model))
        return Plan(changed, alone, data, libraries=0).schedule.tokens([0])

    assert (planned("shared"), planned("packed"), planned("padded")) == (20, 14 + 15 + 14 + 13, 4 * 15)


@pytest.mark.parametrize(
    ("rows", "dpo", "told"),
    [
        (WITH_MARGINS, {"loss_type": ["nca_pair"]}, "'margin' goes with sigmoid, .* not with --loss_type nca_pair"),
        (WITH_MARGINS, {"f_divergence_type": "js_divergence"}, "does not go with --f_divergence_type js_divergence"),
        (WEIGHED, {"loss_type": ["aot"]}, "'weight' does not go with --loss_type aot.*--ignore_columns weight"),
    ],
)
def test_losses_without_a_place_for_a_column_refuse_it(rows: Any, dpo: Any, told: str, model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=told):
        run_dpo(run_of(model, rows, tmp_path / "out", dpo))


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_margins_and_weights_of_losses_without_a_reference(name: str, model: Path, tmp_path: Path):
    """Step 1 by hand from the logged rewards: they are those of the loss, and the margins its own."""
    rows = [BOTH[2]]
    run_dpo(run_of(model, rows, tmp_path / "out", {"loss_type": [name]}, max_steps=1))
    log = json.loads((tmp_path / "out" / "training_metrics.json").read_text())["log_history"][0]
    beyond = log["rewards/margins"] - (0.5 if name == "simpo" else 0) + 1.0
    assert log["loss"] == pytest.approx(1.5 * -logsigmoid(torch.tensor(beyond)).item(), abs=1e-5)


def test_an_evaluation_counts_rows(model: Path, tmp_path: Path):
    """Two batches of rows, of 5 pairs and of 1: the mean is over 3 rows, each the sum of its pairs."""
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.save_pairs(folder / "train.jsonl", ROWS)
    tiny.save_pairs(folder / "test.jsonl", BOTH)
    run = run_of(
        model, ROWS, tmp_path / "out", {}, max_steps=1, eval_strategy="steps", eval_steps=1, eval_on_start=True,
        per_device_eval_batch_size=2,
    )  # fmt: skip
    run_dpo(run._replace(data=DataOptions(str(folder))))
    log = json.loads((tmp_path / "out" / "training_metrics.json").read_text())["log_history"]
    at_start = next(entry for entry in log if "eval_loss" in entry)
    wanted = sum(
        weight * -logsigmoid(torch.tensor(-margin)).item() for weight, margin in [(2, 0.5), (0.5, 2.0), (1.5, -1.0)]
    )
    assert at_start["eval_loss"] == pytest.approx(wanted / 3, abs=1e-5)
    assert at_start["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_changed_weights_are_other_data(model: Path, tmp_path: Path):
    """A run that is gone on with must have the same numbers; the tokens alone do not tell."""
    out = tmp_path / "out"
    given = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = run_of(model, WEIGHED, tmp_path / "whole" / "out", {}, **given)
    run_dpo(whole)
    run_dpo(run_of(model, WEIGHED, out, {}, **given))
    (out / "manifest.json").unlink()
    for name in ("checkpoint-2",):
        import shutil

        shutil.rmtree(out / name)
    run_dpo(run_of(model, WEIGHED, out, {}, **given))
    ends = [load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole" / "out")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "checkpoint-2")
    changed = [WEIGHED[0] | {"weight": 1.0}, *WEIGHED[1:]]
    with pytest.raises(UserError, match=r"other settings \(tokens was"):
        run_dpo(run_of(model, changed, out, {}, **given))
