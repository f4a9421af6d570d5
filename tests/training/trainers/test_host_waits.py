"""Nothing in a micro-batch makes the host wait for the device, counted on the CPU by what would wait on a GPU."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig
from trl.trainer import dpo_trainer as trl_dpo_trainer

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.engine.pairs import PairCollator
from tandem.models.load import load_model, load_tokenizer
from tandem.models.lora import lora_config
from tandem.monitor.options import MonitorOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import EngineOptions
from tandem.training.trainers.trl import TandemDPOTrainer

_WAITING = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique_dim", "aten._unique2"}
# The CPU answers these without a dispatch of their own
_TO_HOST = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class Waits(TorchDispatchMode):
    """Names of the calls that would wait, each with the innermost function of TRL or Tandem that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def add(self, call: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not ("/tandem/" in (file := frame.f_code.co_filename) or "/trl/" in file):
            frame = frame.f_back
        where = "" if frame is None else f" in {Path(file).name}:{frame.f_code.co_name}"
        self.seen.append(call + where)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function.overloadpacket)
        by_mask = name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING or by_mask:
            self.add(name)
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _TO_HOST:
            self.waits.add(function.__name__)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    with Waits() as waits, _Reads(waits):
        yield waits.seen


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_is_counted(call: Any):
    with counted() as waits:
        call(torch.arange(4))
    assert len(waits) == 1


@pytest.mark.parametrize("mode", ["full", "lora", "checkpointing"])
def test_no_micro_batch_waits(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: Any, mode: str):
    source = ModelOptions(model_name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(source)
    rows = load_pairs(DataOptions(dataset_name=str(tiny_data)), "train")[:12]
    pairs = [tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows]

    waited: list[list[str]] = []
    step = TandemDPOTrainer.training_step

    def training_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with counted() as waits:
            result = step(self, *arguments, **keywords)
        waited.append(waits)
        return result

    monkeypatch.setattr(TandemDPOTrainer, "training_step", training_step)
    trainer = TandemDPOTrainer(
        model=load_model(source),
        args=DPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=mode == "checkpointing",
            max_steps=3,
            logging_steps=2,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora_config(LoraOptions(use_peft=True)) if mode == "lora" else None,
        engine=EngineOptions(ref_cache=str(tmp_path / "cache")),
        monitor=MonitorOptions(),
        logs_dir=tmp_path / "logs",
        data_collator=PairCollator(tokenizer.pad_token_id, 1024),
    )
    trainer.train()
    assert len(waited) == 6
    of_trl = f"{Path(trl_dpo_trainer.__file__).name}:_compute_loss"
    for waits in waited[1:]:  # before the first, once a run, the policy is compared with its reference
        assert [wait for wait in waits if of_trl not in wait] == []
