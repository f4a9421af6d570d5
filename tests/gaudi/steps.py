"""A few optimizer steps, with what each micro-batch came out as: `python steps.py TRAINER CASES.json RESULT.json`.

Runs in both environments. TRAINER is `stock` (TRL 1.16's own class), `trl` (Tandem's on it) or `gaudi`.
"""

import dataclasses
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tandem.models import habana
from tandem.models.load import load_model, load_tokenizer
from tandem.monitor.gather import ROWS, MicroBatch
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import EngineOptions, GaudiOptions, SFTOptions, TrainOptions
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.preparation import training_data
from tandem.training.stages import training_arguments
from tandem.training.trainers.build import Build


@dataclasses.dataclass
class Case:
    """One run. `loss_type` `sft` is SFT on the chosen answers."""

    model: str
    data: str
    output_dir: str
    loss_type: str = "sigmoid"
    use_peft: bool = False
    batch: int = 4
    accumulation: int = 1
    beta: float = 0.3
    max_length: int = 96
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More options of TrainOptions and DPOOptions."""


def build(trainer: str, case: Case) -> Any:
    """The trainer of a case, as `tandem.training.stages` builds it, its micro-batches recorded in `trainer.steps`."""
    model = ModelOptions(model_name_or_path=case.model)
    lora = LoraOptions(use_peft=True, lora_r=4) if case.use_peft else LoraOptions()
    text = TextOptions(max_length=case.max_length)
    of_training = {field.name for field in dataclasses.fields(TrainOptions)}
    training = {
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
    } | {name: value for name, value in case.extra.items() if name in of_training}
    options = SFTOptions if case.loss_type == "sft" else TrainOptions
    train = options(
        output_dir=case.output_dir,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation,
        **training,
    )
    of_loss = {name: value for name, value in case.extra.items() if name not in of_training}
    tokenizer = load_tokenizer(model)
    data_options = DataOptions(dataset_name=case.data)
    rows = load_pairs(data_options, "train")
    arguments = training_arguments(train, model) | {"disable_tqdm": True}
    if case.loss_type == "sft":
        sft = SFTOptionSet(model, lora, text, data_options, train, GaudiOptions())
        splits = training_data(sft, tokenizer).splits
        return _builders(trainer).sft_trainer(Build(sft, load_model(model), tokenizer, arguments, splits))
    dpo = DPOOptions(beta=case.beta, loss_type=[case.loss_type], **of_loss)
    pairs = [tokenize_pair(render(row, True), tokenizer) | {"pair_id": row["pair_id"]} for row in rows]
    data = Dataset.from_list(pairs)
    if trainer == "stock":
        return _stock(load_model(model), tokenizer, arguments, text, lora, dpo, data)
    engine = EngineOptions(ref_cache=f"{case.output_dir}/cache")
    run = DPOOptionSet(model, lora, text, data_options, train, dpo, engine, MonitorOptions(), GaudiOptions())
    logs_dir, splits = Path(case.output_dir) / "logs", {"train_dataset": data}
    return _builders(trainer).dpo_trainer(Build(run, load_model(model), tokenizer, arguments, splits, logs_dir))


def _builders(trainer: str) -> Any:
    if trainer == "gaudi":
        habana.prepare()
        from tandem.training.trainers import gaudi

        return gaudi
    from tandem.training.trainers import trl

    return trl


def _stock(policy: Any, tokenizer: Any, arguments: dict[str, Any], text: Any, lora: Any, dpo: Any, data: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    from tandem.models.lora import lora_config

    class Spied(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, **keywords: Any) -> Any:
            seen = []

            def spied(*args: Any, **kwargs: Any) -> Any:
                output = model(*args, **kwargs)
                seen.append(output.log_probs.detach().sum(1))
                return output

            loss = super().compute_loss(spied, inputs, **keywords)
            chosen, rejected = seen[0].chunk(2)
            margins = chosen - inputs["ref_chosen_logps"] - rejected + inputs["ref_rejected_logps"]
            RECORD.append({"margins": margins.tolist(), "loss": loss.item()})
            return loss

    config = DPOConfig(
        **arguments,
        max_length=text.max_length,
        beta=dpo.beta,
        loss_type=dpo.loss_type,
        precompute_ref_log_probs=True,
    )
    return Spied(
        model=policy,
        args=config,
        processing_class=tokenizer,
        train_dataset=data.remove_columns("pair_id"),
        peft_config=lora_config(lora),
    )


RECORD: list[dict[str, Any]] = []


def _recording_add(add: Any) -> Any:
    def recorded(self: Monitor, micro_batch: MicroBatch) -> None:
        margins = micro_batch.values[ROWS.index("margin")]
        RECORD.append({"margins": margins.tolist(), "loss": micro_batch.loss.item()})
        add(self, micro_batch)

    return recorded


def run(trainer: str, case: Case) -> dict[str, Any]:
    """Micro-batches in their order, and the norm of all weights at the end, which a difference in a step would move."""
    RECORD.clear()
    built = build(trainer, case)
    for name, parameter in built.model.named_parameters():
        if "lora_A" in name:  # PEFT's versions draw them in another order
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            torch.nn.init.uniform_(parameter, -0.2, 0.2, generator=generator)
    if case.loss_type == "sft":
        compute = built.compute_loss

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            loss = compute(*arguments, **keywords)
            RECORD.append({"margins": [], "loss": loss.item()})
            return loss

        built.compute_loss = recorded
    built.train()
    weights = [p.detach().double() for p in built.model.parameters() if p.requires_grad]
    return {"steps": list(RECORD), "norm": float(torch.stack([w.square().sum() for w in weights]).sum().sqrt())}


def main(trainer: str, cases: str, result: str) -> None:
    Monitor.add = _recording_add(Monitor.add)  # type: ignore[method-assign]
    named = json.loads(Path(cases).read_text())
    results = {}
    for name, case in named.items():
        results[name] = run(trainer, Case(**case | {"output_dir": f"{case['output_dir']}/{trainer}"}))
    Path(result).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
