"""Each bug of optimum-habana 1.21.2's GaudiDPOTrainer: there in the stock class, gone in ours."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import habana_frameworks.torch.hpu as stub
import pytest
import torch
from datasets import Dataset
from optimum.habana import GaudiConfig
from optimum.habana.transformers.modeling_attn_mask_utils import GaudiAttentionMaskConverter
from optimum.habana.transformers.models.gemma3.modeling_gemma3 import GaudiGemma3ForCausalLM
from optimum.habana.trl import GaudiDPOConfig, GaudiDPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.errors import UserError
from tandem.models import habana
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import GaudiOptions, TrainOptions
from tandem.training.trainers import select
from tests import tiny
from tests.gaudi import steps
from tests.gaudi.steps import Case

STOCK_MASK = GaudiAttentionMaskConverter._make_causal_mask
STOCK_INPUTS = GaudiGemma3ForCausalLM.prepare_inputs_for_generation


@pytest.fixture(scope="module", autouse=True)
def _adapted() -> None:
    habana.prepare()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_pairs(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.hh_rows(8)))


def stock(model: Path, folder: Path, **arguments: Any) -> GaudiDPOTrainer:
    """The stock trainer; LoRA with `peft_config`, a model of its own for reference with `ref_model`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for row in tiny.hh_rows(8):
        prompt = row["chosen"].rsplit(" ", 2)[0]
        rows.append({"prompt": prompt, "chosen": row["chosen"][len(prompt) :], "rejected": " no"})
    own = {name: arguments.pop(name) for name in ("peft_config", "ref_model", "gaudi_config") if name in arguments}
    config = GaudiDPOConfig(
        output_dir=str(folder),
        **{
            "use_habana": False,
            "use_lazy_mode": False,
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "max_length": 64,
            "max_prompt_length": 60,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        | arguments,
    )
    policy = AutoModelForCausalLM.from_pretrained(model)
    keywords = {"gaudi_config": GaudiConfig(), "train_dataset": Dataset.from_list(rows), "tokenizer": tokenizer} | own
    return GaudiDPOTrainer(policy, args=config, **keywords)


def ours(model: Path, data: str, folder: Path, **case: Any) -> Any:
    return steps.build("gaudi", Case(str(model), data, str(folder), **case))


def moved(trainer: Any) -> float:
    """How far one SGD step without clipping moves the weights: the gradient's norm, up to the learning rate."""
    before = copy.deepcopy(list(trainer.model.parameters()))
    trainer.train()
    after = trainer.model.parameters()
    return float(sum((a - b).double().square().sum() for a, b in zip(after, before, strict=True)) ** 0.5)


def test_accumulation_sums_micro_batches(tiny_model: Path, data: str, tmp_path: Path):
    plain = {"max_steps": 1, "max_grad_norm": 0.0}
    apart = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}

    def with_reference(name: str, **more: Any) -> Any:
        reference = AutoModelForCausalLM.from_pretrained(tiny_model)
        return stock(tiny_model, tmp_path / name, ref_model=reference, **more)

    # In two orders of the data the gradients are not the same, so the ratio is not exactly 4
    assert moved(with_reference("s1", **apart)) / moved(with_reference("s2")) > 2
    together = moved(ours(tiny_model, data, tmp_path / "o1", batch=4, extra=plain))
    parts = moved(ours(tiny_model, data, tmp_path / "o2", batch=1, accumulation=4, extra=plain))
    assert parts == pytest.approx(together, rel=1e-5)


def test_precomputed_reference_is_not_used(tiny_model: Path, data: str, tmp_path: Path):
    theirs = stock(tiny_model, tmp_path / "s", precompute_ref_log_probs=True, max_steps=3)
    theirs.train()
    mine = ours(tiny_model, data, tmp_path / "o", extra={"max_steps": 3})
    mine.train()

    def margins(trainer: Any) -> list[float]:
        return [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]

    assert margins(theirs) == [0.0, 0.0, 0.0]
    assert margins(mine)[0] == 0.0
    assert all(abs(margin) > 1e-3 for margin in margins(mine)[1:])


@contextlib.contextmanager
def flags_seen(trainer: Any) -> Iterator[list[bool]]:
    """What `use_flash_attention` is in each attention layer of the model."""
    attention = type(trainer.model.model.layers[0].self_attn)
    seen: list[bool] = []
    forward = attention.pre_attn_forward

    def spied(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(bool(kwargs.get("use_flash_attention")))
        return forward(self, *args, **kwargs)

    attention.pre_attn_forward = spied
    try:
        yield seen
    finally:
        attention.pre_attn_forward = forward


def test_flash_attention_reaches_the_model(tiny_model: Path, gemma: Path, data: str, tmp_path: Path):
    theirs = stock(tiny_model, tmp_path / "s", ref_model=AutoModelForCausalLM.from_pretrained(tiny_model))
    theirs.model.generation_config.use_flash_attention = True
    with flags_seen(theirs) as seen:
        theirs.train()
    assert seen
    assert not any(seen)
    for model in (tiny_model, gemma):
        mine = ours(model, data, tmp_path / f"o-{model.name}", extra={"max_steps": 1})
        mine._prepare_forward(GaudiOptions(use_flash_attention=True, flash_attention_recompute=True), 64)
        assert mine._flags["flash_attention_recompute"]
        with flags_seen(mine) as seen:
            mine.train()
        assert seen
        assert all(seen)
    with pytest.raises(UserError, match="window of 8 tokens would be lost"):
        mine._prepare_forward(GaudiOptions(use_flash_attention=True, flash_attention_causal_mask=True), 64)


def test_lazy_mode_with_checkpointing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs = stock(
        tiny_model,
        tmp_path / "s",
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
        use_cpu=False,
        use_habana=True,
        use_lazy_mode=True,
        gradient_checkpointing=True,
    )
    with pytest.raises(Exception):  # noqa: B017  inside of torch, as the version at hand has it
        theirs.train()
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    model = ModelOptions(model_name_or_path=str(tiny_model))
    train = TrainOptions(output_dir=str(tmp_path / "o"), gradient_checkpointing=True)
    with pytest.raises(UserError, match="--gradient_checkpointing fails in lazy mode"):
        select.builders(model, LoraOptions(), train, GaudiOptions(), DPOOptions())


def test_sliding_window(gemma: Path):
    """`gemma` computes what TRL 1.16 computes in test_equality; here are the keys each query sees."""

    def keys(make: Any) -> list[int]:
        mask = make((1, 12), torch.float32, torch.device("cpu"), sliding_window=4)
        return (mask[0, 0] == 0).sum(-1).tolist()

    exact = [min(row + 1, 4) for row in range(12)]
    assert keys(STOCK_MASK) != exact
    assert max(keys(STOCK_MASK)) == 5
    assert keys(GaudiAttentionMaskConverter._make_causal_mask) == exact


def test_gemma_3_answers_with_its_cache_as_without(gemma: Path, monkeypatch: pytest.MonkeyPatch):
    """Stock, the cache is fed with another token than the one drawn."""
    model = AutoModelForCausalLM.from_pretrained(gemma)
    ids = torch.randint(6, 200, (2, 20), generator=torch.Generator().manual_seed(0))

    def answers(use_cache: bool) -> list[list[int]]:
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, use_cache=use_cache)
        return rows[:, 20:].tolist()

    assert answers(True) == answers(False)
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", STOCK_INPUTS)
    assert answers(True) != answers(False)


def test_graphs_with_a_shared_reference(tiny_model: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stock class records the policy as a graph and runs the reference through it with the adapter off."""
    from tandem.models.lora import lora_config

    lora = lora_config(LoraOptions(use_peft=True, lora_r=4))
    lazy = {"use_cpu": False, "use_habana": True, "use_lazy_mode": True, "use_hpu_graphs_for_training": True}
    stub.wrapped_in_graphs.clear()
    theirs = stock(tiny_model, tmp_path / "s", peft_config=lora, **lazy)
    theirs.train()
    assert any(model is theirs.model for model in stub.wrapped_in_graphs)
    assert theirs.ref_model is None

    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    monkeypatch.setattr(steps, "training_arguments", _on_hpu(steps.training_arguments))
    for use_peft, graphs in ((True, False), (False, True)):
        stub.wrapped_in_graphs.clear()
        mine = ours(tiny_model, data, tmp_path / f"o{use_peft}", use_peft=use_peft, extra={"max_steps": 1})
        mine.train()
        assert mine.args.use_habana
        assert mine.args.use_lazy_mode
        assert bool(stub.wrapped_in_graphs) == graphs


def _on_hpu(arguments: Any) -> Any:
    return lambda *options: arguments(*options) | {"use_cpu": False}
