"""TandemDPOTrainer beside stock TRL's: the same numbers in every log, and no reference forward with a full cache."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.engine.pairs import PairCollator
from tandem.models.load import load_model, load_tokenizer
from tandem.monitor.options import MonitorOptions
from tandem.options.model import ModelOptions
from tandem.options.training import EngineOptions
from tandem.training.trainers.reference_scorer import ReferenceScorer
from tandem.training.trainers.trl import TandemDPOTrainer

# Of the run's clock, or ours
NOT_COMPARED = ("runtime", "per_second", "system/", "tail/")


class Stock(DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def history(cls: type, model: Path, data: Path, folder: Path, **changes: Any) -> list[dict[str, float]]:
    source = ModelOptions(model_name_or_path=str(model))
    tokenizer = load_tokenizer(source)
    rows = load_pairs(DataOptions(dataset_name=str(data)), "train")
    pairs = [tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows]
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "logging_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    ours: dict[str, Any] = {}
    dataset = Dataset.from_list(pairs)
    if cls is TandemDPOTrainer:
        engine = EngineOptions(ref_cache=str(folder / "cache"))
        collator = PairCollator(pad_token_id=tokenizer.pad_token_id, max_length=arguments.get("max_length", 1024))
        dpo = arguments.pop("dpo", None)
        ours = {
            "dpo": dpo,
            "engine": engine,
            "monitor": MonitorOptions(),
            "logs_dir": folder / "logs",
            "data_collator": collator,
        }
        arguments["precompute_ref_log_probs"] = True
    else:
        dataset = dataset.remove_columns("pair_id")
    config = DPOConfig(**arguments)
    trainer = cls(model=load_model(source), args=config, train_dataset=dataset, processing_class=tokenizer, **ours)
    trainer.train()
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("changes", [{}, {"ld_alpha": 0.3}, {"loss_type": ["sigmoid", "sft"]}, {"max_length": 40}])
def test_every_logged_number_is_trls(tiny_model: Path, tiny_data: Path, tmp_path: Path, changes: dict[str, Any]):
    stock = history(Stock, tiny_model, tiny_data, tmp_path / "stock", **changes)
    ours = history(TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "ours", **changes)
    assert len(stock) == len(ours) == 3  # after steps 3 and 6, and the end
    for theirs, mine in zip(stock, ours, strict=True):
        assert theirs.keys() == mine.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


def test_a_full_cache_means_no_reference_forward(
    script: Callable[[str], ModuleType],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[int] = []
    scored = ReferenceScorer.logps

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        calls.append(len(inputs["input_ids"]) // 2)
        return scored(self, model, inputs)

    monkeypatch.setattr(ReferenceScorer, "logps", counted)

    def run(name: str, *flags: str) -> int:
        calls.clear()
        common = (
            f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --ref_cache {tmp_path}/cache --max_steps 1"
        )
        script("dpo").main([*common.split(), "--bf16", "false", "--output_dir", str(tmp_path / name), *flags])
        return sum(calls)

    assert run("first") == 32
    assert run("sweep", "--beta", "0.3", "--learning_rate", "1e-3", "--loss_type", "ipo", "--seed", "7") == 0
    assert run("lora", "--use_peft") == 0
    assert run("tail_weighted", "--ld_alpha", "0.5") == 32
    assert run("cut", "--max_length", "30", "--max_prompt_length", "20") > 0
    assert run("text", "--use_chat_template", "false") == 32


def test_a_pair_that_is_there_twice(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Equal pairs have one entry in the cache, which must not shift the reference of the pairs after them."""
    source = ModelOptions(model_name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(source)
    rows = load_pairs(DataOptions(dataset_name=str(tiny_data)), "train")[:6]
    pairs = [tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows]
    twice = [pairs[0], pairs[1], pairs[0] | {"pair_id": "again"}, *pairs[2:]]

    def reference(name: str, dataset: list[dict[str, Any]]) -> list[float]:
        trainer = TandemDPOTrainer(
            model=load_model(source),
            args=DPOConfig(
                output_dir=str(tmp_path / name),
                per_device_train_batch_size=2,
                bf16=False,
                use_cpu=True,
                report_to="none",
                precompute_ref_log_probs=True,
            ),
            train_dataset=Dataset.from_list(dataset),
            processing_class=tokenizer,
            engine=EngineOptions(ref_cache=str(tmp_path / name / "cache")),
            monitor=MonitorOptions(),
            logs_dir=tmp_path / name / "logs",
            data_collator=PairCollator(tokenizer.pad_token_id, 1024),
        )
        return trainer.train_dataset["ref_chosen_logps"]

    once, again = reference("once", pairs), reference("twice", twice)
    assert [*once[:2], once[0], *once[2:]] == pytest.approx(list(again), abs=1e-4)
    assert len(set(once)) == len(once)


def test_batches_of_workers_are_the_same(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """On an accelerator two processes collate; the order of the pairs, and every number, must not know."""
    alone = history(TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "alone", max_steps=3, logging_steps=1)
    workers = {"dataloader_num_workers": 2}
    beside = history(
        TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "beside", max_steps=3, logging_steps=1, **workers
    )
    assert beside == alone


def test_one_process_takes_one_of_several_gpus(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: Any):
    """accelerate's launcher of one process leaves all GPUs visible, which transformers would take for DataParallel."""
    real = DPOConfig.__post_init__

    def sees_two(self: DPOConfig) -> None:
        real(self)
        assert self.device.type == "cpu"
        self._n_gpu = 2

    monkeypatch.setattr(DPOConfig, "__post_init__", sees_two)
    with pytest.raises(ValueError, match="DataParallel"):
        history(Stock, tiny_model, tiny_data, tmp_path / "stock", max_steps=1)
    assert len(history(TandemDPOTrainer, tiny_model, tiny_data, tmp_path / "ours", max_steps=1)) == 1
