"""--token_budget: batches forwarded in parts, and nothing else changed by it."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tandem.engine.balance import evenly, parts_within
from tandem.errors import UserError
from tandem.monitor.gather import MicroBatch
from tests import tiny
from tests.training.test_stages import arguments

BUDGET = 700
PAIRS = 20  # two steps of two batches of four, and a half one


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 400), st.booleans())
@settings(deadline=None, max_examples=200)
def test_parts_of_equal_counts_within_the_budget(sizes: list[int], budget: int, padded: bool):
    def size(part: list[int]) -> int:
        own = [sizes[item] for item in part]
        return len(own) * max(own) if padded else sum(own)

    parts = parts_within(sizes, budget, padded=padded)
    cut = evenly(sizes, parts, padded=padded)
    assert sorted(itertools.chain(*cut)) == list(range(len(sizes)))
    assert {len(part) for part in cut} == {len(sizes) // parts}
    assert parts == len(sizes) or max(map(size, cut)) <= budget
    # Fewer would not do, however they are cut: the mean is above the budget, or the longest with the shortest
    for fewer in range(1, parts):
        if len(sizes) % fewer == 0:
            count = len(sizes) // fewer
            least = max(sum(sizes) / fewer, max(sizes) + sum(sorted(sizes)[: count - 1]))
            if padded:
                least = count * max(sizes)
            assert max(map(size, evenly(sizes, fewer, padded=padded))) > budget or least > budget


def test_joined_micro_batches_are_the_whole():
    def micro(ids: list[str], margins: list[float], loss: float, tokens: int) -> MicroBatch:
        values = torch.tensor(margins)
        return MicroBatch.of(ids, values, (values + 1, values + 2), torch.tensor(loss), tokens=tokens)

    joined = MicroBatch.joined(
        [micro(["c", "a"], [3.0, 1.0], 0.5, 10), micro(["b", "d"], [2.0, 4.0], 0.7, 7)], [2, 0, 1, 3], lambda: {}
    )
    assert joined.pair_ids == ["a", "b", "c", "d"]
    assert joined.values[0].tolist() == [1, 2, 3, 4]
    assert joined.values[1].tolist() == [2, 3, 4, 5]
    assert joined.loss == pytest.approx(0.6)
    assert joined.tokens == 17


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 50 to 400 tokens."""
    return tiny.save_pairs(tmp_path_factory.mktemp("uneven") / "pairs.jsonl", tiny.uneven_rows(PAIRS))


Run = Callable[..., Path]


@pytest.fixture
def dpo(script: Callable[[str], ModuleType], tmp_path: Path, tiny_model: Path, uneven_data: Path) -> Run:
    def run(name: str, **flags: Any) -> Path:
        given = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "save_steps": 2} | flags
        given = {"ref_cache": tmp_path / f"cache_{name}"} | given
        script("dpo").main(arguments(tiny_model, uneven_data, tmp_path / name, **given))
        return tmp_path / name

    return run


def margins(folder: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted((folder / "logs" / "margins").rglob("step_*.npy"))]


def logged(folder: Path) -> list[dict[str, float]]:
    entries = json.loads((folder / "training_metrics.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_the_same_training_in_smaller_parts(dpo: Run, monkeypatch: pytest.MonkeyPatch, layout: str):
    """Losses, TRL's metrics, margins, weights and cached references; and no more tokens at a time than asked for."""
    from tandem.training.trainers.trl import TandemDPOTrainer

    forwarded: list[tuple[int, int]] = []
    logps = TandemDPOTrainer._logps
    compute = TandemDPOTrainer.compute_loss

    def size(inputs: Any) -> tuple[int, int]:
        mask = inputs["attention_mask"]
        shared = 0
        for one, other in zip(*(inputs["input_ids"].chunk(2)), strict=True):
            same = (one == other).long().cumprod(0).sum()
            shared += int(min(same, mask.sum(1).min()))
        tokens = mask.numel() if layout == "padded" else int(mask.sum()) - shared
        return len(mask) // 2, tokens

    def watched_logps(self: Any, model: Any, inputs: Any) -> Any:
        forwarded.append(size(inputs))
        return logps(self, model, inputs)

    def watched_loss(self: Any, model: Any, inputs: Any, *given: Any, **keywords: Any) -> Any:
        forwarded.append(size(inputs))
        return compute(self, model, inputs, *given, **keywords)

    monkeypatch.setattr(TandemDPOTrainer, "_logps", watched_logps)
    monkeypatch.setattr(TandemDPOTrainer, "compute_loss", watched_loss)
    whole = dpo("whole", layout=layout)
    assert max(tokens for _, tokens in forwarded) > BUDGET
    forwarded.clear()
    parts = dpo("parts", layout=layout, token_budget=BUDGET)
    assert len({pairs for pairs, _ in forwarded}) > 1
    assert all(tokens <= BUDGET or pairs == 1 for pairs, tokens in forwarded)
    for mine, its in zip(margins(parts), margins(whole), strict=True):
        assert mine["pair_id"].tolist() == its["pair_id"].tolist()
        np.testing.assert_allclose(mine["margin"], its["margin"], rtol=1e-4, atol=1e-4)
    for mine, its in zip(logged(parts), logged(whole), strict=True):
        for name in ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "logps/chosen", "num_tokens"):
            assert mine[name] == pytest.approx(its[name], rel=1e-3, abs=1e-5), name
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (parts, whole))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-4)


def test_a_resumed_run_is_bit_equal(dpo: Run):
    whole = dpo("run", token_budget=BUDGET)
    before, weights = margins(whole), (whole / "model.safetensors").read_bytes()
    for file in ("manifest.json", "training_metrics.json", "model.safetensors"):
        (whole / file).unlink()
    for saved in sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1:]:
        shutil.rmtree(saved)
    dpo("run", token_budget=BUDGET)
    assert (whole / "model.safetensors").read_bytes() == weights
    for mine, its in zip(margins(whole), before, strict=True):
        assert mine.tolist() == its.tolist()


def test_losses_that_couple_pairs_refuse_it(dpo: Run):
    with pytest.raises(UserError, match="--token_budget: aot may depend on which pairs share a micro-batch"):
        dpo("aot", loss_type="aot", token_budget=BUDGET)


def test_deepspeed_refuses_it(dpo: Run, monkeypatch: pytest.MonkeyPatch):
    from tandem.options.losses import DPOOptions
    from tandem.options.training import EngineOptions, TrainOptions
    from tandem.training.dealing import check_budget

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    run: Any = type(
        "Run", (), {"engine": EngineOptions(token_budget=9), "train": TrainOptions("o"), "dpo": DPOOptions()}
    )
    with pytest.raises(UserError, match="--token_budget: DeepSpeed counts micro-batches by itself"):
        check_budget(run, None)
    run.engine = EngineOptions()
    check_budget(run, None)


def test_the_plan_counts_the_parts(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    tiny_model: Path,
    uneven_data: Path,
    capsys: pytest.CaptureFixture[str],
):
    def activations(**flags: Any) -> float:
        script("dpo").main(arguments(tiny_model, uneven_data, tmp_path / "out", plan="true", **flags))
        line = next(line for line in capsys.readouterr().out.splitlines() if "activations" in line)
        return float(line.split()[1])

    assert activations(token_budget=BUDGET, per_device_train_batch_size=16) < activations(
        per_device_train_batch_size=16
    )
