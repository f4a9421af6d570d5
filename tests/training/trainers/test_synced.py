"""TR-DPO: the reference follows the policy as TRL's does; with LoRA and the cache, too; and over a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trl import DPOTrainer

from tandem.errors import UserError
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions
from tandem.runs import MANIFEST
from tandem.training.stages import run_dpo
from tandem.training.trainers.synced import REFERENCE, SyncedReference
from tandem.training.trainers.trl import TandemDPOTrainer
from tests import tiny
from tests.training.trainers.test_objective import run_of
from tests.training.trainers.test_tandem_trainer import Stock, history

SYNCED: dict[str, Any] = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
PAIRS = tiny.hh_rows(16)


def logs(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "training_metrics.json").read_text())["log_history"]


def test_every_logged_number_is_trls(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Three syncs in seven steps, of which every one is logged."""
    common = {"logging_steps": 1, "learning_rate": 0.2}
    stock = history(Stock, tiny_model, tiny_data, tmp_path / "stock", **common, **SYNCED)
    ours = history(TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "ours", dpo=DPOOptions(**SYNCED), **common)
    still = history(TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "still", **common)
    assert len(stock) == len(ours) == 8
    for theirs, mine in zip(stock, ours, strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key
    assert issubclass(Stock, DPOTrainer)
    assert abs(still[4]["rewards/margins"] - ours[4]["rewards/margins"]) > 1e-3


def lora_run(model: Path, out: Path, **given: Any) -> Any:
    steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "learning_rate": 0.5}
    run = run_of(model, PAIRS, out, SYNCED, **(steps | given))
    return run._replace(lora=LoraOptions(use_peft=True, lora_r=4))


@pytest.mark.parametrize("use_peft", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_resumed_run_is_the_whole_one(use_peft: bool, tiny_model: Path, tmp_path: Path):
    """Killed after a step that synced, after one that did not, and before the first sync: bit for bit the same end."""
    name = "adapter_model.safetensors" if use_peft else "model.safetensors"

    def run(out: Path) -> dict[str, torch.Tensor]:
        asked = lora_run(tiny_model, out)
        run_dpo(asked if use_peft else asked._replace(lora=LoraOptions()))
        return load_file(out / name)

    whole, out = run(tmp_path / "whole"), tmp_path / "out"
    run(out)
    assert not (out / "checkpoint-1" / REFERENCE).exists() and (out / "checkpoint-2" / REFERENCE).exists()
    for step in (4, 3, 1):
        (out / MANIFEST).unlink()
        for later in range(step + 1, 7):
            shutil.rmtree(out / f"checkpoint-{later}", ignore_errors=True)
        again = run(out)
        assert all(torch.equal(again[key], whole[key]) for key in whole), step
        assert [log.get("loss") for log in logs(out)] == [log.get("loss") for log in logs(tmp_path / "whole")]


def test_an_adapter_is_synced_by_its_own_parameters(tiny_model: Path, tmp_path: Path):
    """After step 2 the reference holds 0.3 of the policy of step 2 and 0.7 of the adapter before training."""
    run_dpo(lora_run(tiny_model, tmp_path / "out", max_steps=2))
    saved = load_file(tmp_path / "out" / "checkpoint-2" / REFERENCE)
    policy = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    for key, value in policy.items():
        if "lora_B" in key:  # which begins at 0
            held = saved[key.replace("lora_B.weight", "lora_B.default.weight")]
            torch.testing.assert_close(held, 0.3 * value)
            assert value.abs().max() > 0
    ends = [log for log in logs(tmp_path / "out") if "loss" in log]
    assert ends[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_tensors_change_places_and_come_back():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    reference, first, x = SyncedReference(layer, 1.0, 1), layer.weight.detach().clone(), torch.ones(2)
    before = layer(x).detach()
    with torch.no_grad():
        layer.weight += 1
    place = layer.weight.data_ptr()
    with pytest.raises(KeyError), reference.in_place():
        assert torch.equal(layer(x), before) and torch.equal(layer.weight, first)
        raise KeyError
    assert layer.weight.data_ptr() == place and torch.equal(layer.weight, first + 1)
    reference.sync()
    with reference.in_place():
        assert torch.equal(layer.weight, first + 1) and layer.weight.data_ptr() != place


def test_what_it_cannot_do_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--sync_ref_model has no effect with --loss_type simpo"):
        DPOOptions(loss_type=["simpo"], sync_ref_model=True)
    with pytest.raises(UserError, match="leave --reference_model out"):
        DPOOptions(reference_model="x", sync_ref_model=True)
    with pytest.raises(UserError, match="--ref_model_sync_steps has no effect without --sync_ref_model"):
        DPOOptions(ref_model_sync_steps=3)
    layer = torch.nn.Linear(1, 1)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=f"has no {REFERENCE}"):
        SyncedReference(layer, 0.5, 2).load(tmp_path, steps=2)
