"""A step's pairs dealt evenly over two processes: what is computed stays, and what each has to do becomes alike."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.distributed.launches import run, steps
from tests.distributed.test_sharded_equality import margins_of, trained

PAIRS = 21  # five and a quarter rounds of two processes with two pairs


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 20 to 300 tokens."""
    return tiny.save_pairs(tmp_path_factory.mktemp("uneven") / "pairs.jsonl", tiny.uneven_rows(PAIRS))


def flags(model: Path, data: Path, folder: Path, more: str = "") -> list[str]:
    return f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --bf16 false --num_train_epochs 2
        --logging_steps 1 --learning_rate 1e-3 --save_steps 1 --per_device_train_batch_size 2
        --gradient_accumulation_steps 2 {more}
    """.split()


def check_same(one: Path, other: Path, model: Path, resumed: bool = False) -> None:
    ours, theirs = steps(one), steps(other)
    assert len(ours) == len(theirs) == 6
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-3)
        if not resumed or mine["step"] < 6:  # accelerate forgets which pairs fill the epoch up
            assert mine["num_tokens"] == its["num_tokens"]
    weights = trained(other, model)
    for name, weight in trained(one, model).items():
        assert (weight - weights[name]).abs().mean() < 1e-5, name


@pytest.mark.slow
def test_dealt_evenly_and_not(tiny_model: Path, uneven_data: Path, tmp_path: Path):
    """DPO and SFT over two epochs, the last step of which is filled up; then gone on with in the second."""
    cache = f"--ref_cache {tmp_path / 'cache'}"
    dealt, plain = (flags(tiny_model, uneven_data, tmp_path / name, cache) for name in ("dealt", "plain"))
    sft, plain_sft = (flags(tiny_model, uneven_data, tmp_path / name) for name in ("sft", "plain_sft"))
    said = run(
        "ddp",
        2,
        ["dpo.py", *dealt],
        ["dpo.py", *plain, "--balance_ranks", "false"],
        ["sft.py", *sft],
        ["sft.py", *plain_sft, "--balance_ranks", "false"],
    )
    assert "dealt so that all processes have as much to do" in said
    assert "not dealt: --balance_ranks false" in said
    check_same(tmp_path / "dealt", tmp_path / "plain", tiny_model)
    check_same(tmp_path / "sft", tmp_path / "plain_sft", tiny_model)
    for mine, its in zip(margins_of(tmp_path / "dealt"), margins_of(tmp_path / "plain"), strict=True):
        assert mine["pair_id"].tolist() == its["pair_id"].tolist()
        np.testing.assert_allclose(mine["margin"], its["margin"], rtol=1e-5, atol=1e-5)

    whole = margins_of(tmp_path / "dealt")
    for file in ("manifest.json", "training_metrics.json", "model.safetensors"):
        (tmp_path / "dealt" / file).unlink()
    shutil.rmtree(tmp_path / "dealt" / "checkpoint-6")
    shutil.rmtree(tmp_path / "dealt" / "checkpoint-5")
    assert "resuming from" in run("ddp", 2, ["dpo.py", *dealt])
    check_same(tmp_path / "dealt", tmp_path / "plain", tiny_model, resumed=True)
    for mine, its in zip(margins_of(tmp_path / "dealt"), whole, strict=True):
        assert mine.tolist() == its.tolist()
