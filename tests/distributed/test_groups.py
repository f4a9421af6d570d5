"""Rows of one, two and three rejected answers over two processes, and a reference that follows: as on one."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests import tiny
from tests.distributed.launches import log_history, run
from tests.distributed.test_sharded_equality import margins_of, trained

ROWS = 13  # the last step of an epoch is filled up, as is the last batch of an evaluation


def flags(model: Path, data: Path, folder: Path, pairs: int, more: str) -> list[str]:
    return f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --bf16 false --num_train_epochs 1
        --logging_steps 1 --learning_rate 1e-2 --optim sgd --save_strategy no --per_device_train_batch_size {pairs}
        --per_device_eval_batch_size {pairs} --eval_strategy epoch --ref_cache {folder.parent / "cache"} {more}
    """.split()


@pytest.mark.slow
def test_groups_and_a_synced_reference_on_two_processes(
    script: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path
):
    data = tmp_path / "data"
    data.mkdir()
    for name, start in (("train", 0), ("test", 50)):
        rows = [
            {"prompt": f"say {start + i} {'far ' * (i * i % 11)}", "chosen": f"well {i}", "weight": 0.5 + i % 3}
            | {"rejected": [f"no {i} {k}" for k in range(1 + i % 3)]}
            for i in range(ROWS if name == "train" else 5)
        ]
        tiny.save_pairs(data / f"{name}.jsonl", rows)
    synced = "--sync_ref_model --ref_model_sync_steps 2 --ref_model_mixup_alpha 0.5"
    script("dpo").main(flags(tiny_model, data, tmp_path / "alone", 4, synced))
    run(
        "ddp",
        2,
        ["dpo.py", *flags(tiny_model, data, tmp_path / "two", 2, synced)],
        ["dpo.py", *flags(tiny_model, data, tmp_path / "dealt", 2, f"{synced} --balance_ranks false")],
    )
    alone = margins_of(tmp_path / "alone")
    for name in ("two", "dealt"):
        # Up to the step that is filled up each is a mean over the same four rows
        for mine, its in list(zip(margins_of(tmp_path / name), alone, strict=True))[:3]:
            assert mine["pair_id"].tolist() == its["pair_id"].tolist()
            np.testing.assert_allclose(mine["margin"], its["margin"], rtol=1e-4, atol=2e-5)
        for mine, its in list(zip(log_history(tmp_path / name), log_history(tmp_path / "alone"), strict=True))[:3]:
            assert mine["loss"] == pytest.approx(its["loss"], abs=2e-5)
            assert mine["rewards/margins"] == pytest.approx(its["rewards/margins"], abs=2e-5)
    assert abs(alone[2]["margin"]).max() > 1e-4
    left, right = (next(log for log in log_history(tmp_path / name) if "eval_loss" in log) for name in ("two", "dealt"))
    assert left["eval_loss"] == pytest.approx(right["eval_loss"], abs=1e-5)
    assert trained(tmp_path / "two", tiny_model).keys() == trained(tmp_path / "alone", tiny_model).keys()
