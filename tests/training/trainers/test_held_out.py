"""What an evaluation in training reports: a mean over held-out rows, whatever the batches and processes."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.models.load import load_model, load_tokenizer
from tandem.models.scorer import Scorer
from tandem.options.model import ModelOptions
from tandem.training.trainers.held_out import own_rows
from tests import tiny
from tests.distributed.launches import run

BETA = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 held-out pairs, the last of them unlike the others; a reference that is another model."""
    folder = tmp_path_factory.mktemp("held_out")
    tiny.save_pairs(folder / "train.jsonl", tiny.hh_rows(8))
    rows = tiny.hh_rows(8, start=32)
    last = "\n\nHuman: say it\n\nAssistant:"
    rows.append({"chosen": f"{last} a cat ran far away from my red house", "rejected": f"{last} no"})
    tiny.save_pairs(folder / "test.jsonl", rows)
    tiny.save_model(folder / "other", seed=1)
    return folder


def command(stage: str, model: Path, folder: Path, out: Path, batch: int) -> list[str]:
    flags = f"""
        --model_name_or_path {model} --dataset_name {folder} --output_dir {out} --bf16 false --max_steps 1
        --learning_rate 0 --save_strategy no --logging_steps 1 --eval_strategy steps --eval_steps 1
        --per_device_train_batch_size 4 --per_device_eval_batch_size {batch}
    """
    dpo = f"--ref_cache {folder}/cache --reference_model {folder}/other --beta {BETA}"
    return [*flags.split(), *(dpo.split() if stage == "dpo" else [])]


def evaluated(out: Path) -> dict[str, float]:
    history = json.loads((out / "training_metrics.json").read_text())["log_history"]
    (found,) = (entry for entry in history if "eval_loss" in entry)
    return {name: value for name, value in found.items() if name.startswith("eval_") and "per_second" not in name}


@pytest.fixture(scope="module")
def truth(tiny_model: Path, folder: Path) -> dict[str, dict[str, float]]:
    """By each pair's own log-probs, scored one by one."""
    scores, pairs = {}, []
    for name, model in (("policy", tiny_model), ("reference", folder / "other")):
        source = ModelOptions(str(model))
        tokenizer = load_tokenizer(source)
        pairs = [tokenize_pair(render(row, True), tokenizer) for row in load_pairs(DataOptions(str(folder)), "test")]
        scores[name] = Scorer(load_model(source), tokenizer, batch_size=1, bf16=False).pair_logps(pairs, None)
    margins = BETA * (scores["policy"] - scores["reference"]) @ np.array([1.0, -1.0])
    tokens = sum(len(pair["chosen_ids"]) for pair in pairs)
    dpo = {
        "eval_loss": np.log1p(np.exp(-margins)).mean(),
        "eval_rewards/margins": margins.mean(),
        "eval_rewards/accuracies": (margins > 0).mean(),
        "eval_logps/chosen": scores["policy"][:, 0].mean(),
    }
    return {"dpo": dpo, "sft": {"eval_loss": -scores["policy"][:, 0].sum() / tokens}}


@pytest.fixture(scope="module")
def alone(
    script: Callable[[str], ModuleType], tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], dict[str, float]]:
    out = tmp_path_factory.mktemp("alone")

    def evaluate(stage: str, batch: int) -> dict[str, float]:
        target = out / f"{stage}-{batch}"
        if not target.exists():
            script(stage).main(command(stage, tiny_model, folder, target, batch))
        return evaluated(target)

    return evaluate


@pytest.mark.parametrize("stage", ["dpo", "sft"])
@pytest.mark.parametrize("batch", [8, 2])
def test_a_row_of_the_last_batch_weighs_as_any_other(alone: Any, truth: Any, stage: str, batch: int):
    found = alone(stage, batch)
    for name, value in truth[stage].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 4), st.integers(1, 2))
def test_each_row_is_some_process_own_once(rows: int, size: int, ranks: int, tp_size: int):
    """Of the batches that accelerate deals, with its own count of what is left over for the last ones."""
    shards = [list(BatchSamplerShard(BatchSampler(range(rows), size, False), ranks, rank)) for rank in range(ranks)]
    counted: list[int] = []
    for process in range(ranks * tp_size):
        for number, batch in enumerate(shards[process // tp_size]):
            last = number == len(shards[0]) - 1
            accelerator: Any = SimpleNamespace(
                gradient_state=SimpleNamespace(end_of_dataloader=last, remainder=rows % (size * ranks)),
                num_processes=ranks * tp_size,
                process_index=process,
            )
            counted += batch[: own_rows(accelerator, size, len(batch), tp_size)]
    assert sorted(counted) == sorted(itertools.chain(*([row] * tp_size for row in range(rows))))


@pytest.mark.slow
def test_several_processes_see_the_same(
    alone: Any, truth: Any, script: Callable[[str], ModuleType], tiny_model: Path, folder: Path, tmp_path: Path
):
    """In batches of 8 the second process has one row of its own and 7 copies, in batches of 4 a last one of copies."""
    runs = {f"{stage}-{batch}": (stage, batch) for stage in ("dpo", "sft") for batch in (8, 4)}
    run("ddp", 2, *([f"{stage}.py", *command(stage, tiny_model, folder, tmp_path / name, batch)]
                    for name, (stage, batch) in runs.items()))  # fmt: skip
    for name, (stage, _) in runs.items():
        several, one = evaluated(tmp_path / name), alone(stage, 8)
        assert several.keys() == one.keys()
        for metric in several.keys() - {"eval_runtime", "eval_num_tokens"}:
            assert several[metric] == pytest.approx(one[metric], rel=1e-5, abs=1e-6), (name, metric)
