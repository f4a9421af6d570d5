"""TRL's trainers on CPU, CUDA and MPS, with Tandem's engine, reference cache and monitor in their places."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tandem.devices import has_hpu
from tandem.engine.balance import Ints
from tandem.engine.forward import pair_engine
from tandem.engine.layout import IGNORED_LABEL, PAIR_LAYOUT, Layout
from tandem.engine.lengths import row_lengths
from tandem.engine.modes import disable_dropout
from tandem.engine.pairs import ExampleCollator, PairCollator, longest_row, sequence_logps
from tandem.engine.ref_cache import RefCache, Source
from tandem.models.load import weight_files
from tandem.models.lora import lora_config
from tandem.monitor.memory import by_rank, read_memory
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions
from tandem.options.fields import handed_on
from tandem.options.losses import DPOOptions
from tandem.options.model import is_adapter
from tandem.options.training import EngineOptions
from tandem.training.dealing import check_budget, row_costs, why_undealt
from tandem.training.examples import packed
from tandem.training.groups import GROUP, Groups, by_row
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.trainers import topology
from tandem.training.trainers.budget import TokenBudget
from tandem.training.trainers.build import Build
from tandem.training.trainers.checkpoints import steps_done
from tandem.training.trainers.deferred import DeferredMetrics
from tandem.training.trainers.held_out import ExampleRows, PairRows
from tandem.training.trainers.monitored import MonitorFeed
from tandem.training.trainers.objective import Objective
from tandem.training.trainers.on_trl import OnTRL
from tandem.training.trainers.reference import starts_as_its_base, without_trls_copy
from tandem.training.trainers.reference_scorer import Logps, ReferenceScorer
from tandem.training.trainers.sharding import ShardedScorer, policy_is_reference
from tandem.training.trainers.synced import SyncCallback, synced_reference


class TandemDPOTrainer(OnTRL, DPOTrainer):
    """TRL's DPOTrainer on tokenized pairs (`data.tokenized.tokenize_pair`) with their `pair_id`.

    Policy and reference are forwarded by the pair engine. The reference's log-probs are read from the cache, or
    computed before training and kept there, so that no reference model is in memory while the policy trains.
    Losses, and the values of all metrics, are TRL's; losses that TRL lacks (`engine.losses`) are added to them.

    Args:
        dpo: says which losses are not TRL's, and whether there is a reference at all; None: all are TRL's.
        undealt: see `OnTRL`.
        reference_source: see `ReferenceScorer`.
    """

    unit = "pairs"
    rows = PairRows()
    reference: ReferenceScorer
    monitor: Monitor
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: list[str]

    def __init__(
        self,
        *,
        ref_model: PreTrainedModel | None = None,
        engine: EngineOptions,
        monitor: MonitorOptions,
        logs_dir: Path,
        dpo: DPOOptions | None = None,
        reference_source: Source | None = None,
        **keywords: Any,
    ) -> None:
        self._dpo, self._layout = dpo or DPOOptions(), engine.layout
        self.budget = TokenBudget(self, engine.token_budget)
        cache = RefCache(engine.ref_cache) if self._dpo.needs_reference else None
        self._given, added = ref_model, keywords.get("peft_config")
        self.reference = ShardedScorer(self, cache, self._logps, given=ref_model, added=added, source=reference_source)
        splits = [keywords["train_dataset"], *_sets(keywords.get("eval_dataset")).values()]
        # Laid out where batches are made, so that no step waits for it
        keywords["data_collator"] = dataclasses.replace(keywords["data_collator"], layout=engine.layout)
        longest = max(longest_row(pairs, keywords["data_collator"].max_length) for pairs in splits)
        # TRL's constructor would hash all weights and look for their scores in a cache of its own
        keywords["args"].precompute_ref_log_probs = False
        with (
            pair_engine(layout=engine.layout, longest=longest),
            policy_is_reference(ref_model),
            without_trls_copy(keywords["model"]),
        ):
            super().__init__(ref_model=ref_model, **keywords)
        self._score_reference()
        if self.args.disable_dropout:
            disable_dropout(self.model)
        self._deferred = DeferredMetrics(self, is_even=not isinstance(self.train_dataset, Groups))
        self._synced = synced_reference(self.model, self._dpo, self.topology)
        if self._synced is not None:
            self.add_callback(SyncCallback(self._synced))
        self.objective = Objective(
            self,
            self._dpo,
            trl_loss=super().compute_loss,
            logps=self._logps,
            deferred=self._deferred,
            synced=self._synced,
        )
        self.feed = MonitorFeed(
            self,
            monitor,
            logs_dir,
            scored=cache is not None,
            ranks_per_batch=self._tp_size,
            in_order=self.dealing.in_order,
        )

    def table_rows(self) -> dict[str, str]:
        cache = self.reference.cache
        if cache is None:
            reference = f"none: {' '.join(self._dpo.loss_type)} needs none"
        else:
            whose = self.reference.name or "the policy before training"
            reference = f"{whose}, sharded like the policy; its log-probs come from {cache.path}"
            if self._dpo.sync_ref_model:
                alpha, steps = self._dpo.ref_model_mixup_alpha, self._dpo.ref_model_sync_steps
                reference += f" until step {steps}; after every {steps} steps {alpha:g} of it is the policy"
        return {"reference": reference, "layout": self._layout} | super().table_rows() | self.budget.table_row()

    def is_padded(self) -> bool:
        return self._layout == "padded"

    def costs(self) -> Ints:
        config = self.model.config.get_text_config()
        return row_costs(self.train_dataset, self.data_collator.max_length, config, self._layout)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return self.objective.loss(model, inputs)

    # Reference

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._given is not None:  # TRL shards it next, and a shard may be of another dtype
            self.reference.identify(self._given)

    def _score_reference(self) -> None:
        """Add the columns of the reference's log-probs to the pairs, and free the reference."""
        if self._given is None:
            self.reference.identify(self.model)
        args = self.args
        args.precompute_ref_log_probs = self.precompute_ref_logps = True  # the loss reads the columns
        size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        self.train_dataset = by_row(self._precompute_ref_logps(self.train_dataset, "train", size))
        size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        sets = {
            name: by_row(self._precompute_ref_logps(each, name or "eval", size))
            for name, each in _sets(self.eval_dataset).items()
        }
        self.eval_dataset = sets if isinstance(self.eval_dataset, dict) else sets.get("")
        self.ref_model = self._given = None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return self.reference.with_columns(dataset, name, batch_size)

    def _logps(self, model: Any, inputs: Mapping[str, Any]) -> Logps:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        text = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": labels}
        if inputs.get(PAIR_LAYOUT) is not None:
            text[PAIR_LAYOUT] = inputs[PAIR_LAYOUT]
        per_token = model(**text, use_cache=False, fused_lm_head=True).log_probs
        chosen, rejected = sequence_logps(per_token, mask[:, 1:], self.ld_alpha).chunk(2)
        return chosen, rejected

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = ("pair_id", "chosen_mask", "rejected_mask", "weight", "margin", GROUP)
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ours]))

    # Batches within the budget

    def get_train_dataloader(self) -> DataLoader:
        with self.budget.loading():
            loader: DataLoader = super().get_train_dataloader()
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        whole = super().training_step
        return self.budget.train(model, inputs, lambda batch: whole(model, batch, *arguments, **keywords))

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        operations: int = super().floating_point_ops(self.budget.as_padded(inputs))
        return operations

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._deferred.resolve()
            logs.update(self.monitor.interval_logs())
        super().log(logs, start_time)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.monitor.add_grad_norm(grad_norm)
        return grad_norm

    # Checkpoints

    def counters(self) -> dict[str, Any]:
        self._deferred.resolve()
        return super().counters()

    def save_beside(self, folder: Path) -> None:
        if self._synced is not None:
            self._synced.save(folder)

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        if self._synced is not None and resume_from_checkpoint:
            self._synced.load(Path(resume_from_checkpoint), steps_done(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)


def _sets(evaluated: Any) -> dict[str, Dataset]:
    """A trainer's evaluation sets by name; the name of a single set is empty."""
    if evaluated is None:
        return {}
    return evaluated if isinstance(evaluated, dict) else {"": evaluated}


class TandemSFTTrainer(OnTRL, SFTTrainer):
    """TRL's SFTTrainer, which also logs the memory of every rank."""

    unit = "examples"
    rows = ExampleRows()

    def is_padded(self) -> bool:
        return getattr(self.data_collator, "layout", "padded") == "padded"

    def costs(self) -> Ints:
        return row_lengths(self.train_dataset, self.args.max_length)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(by_rank(gather_object([read_memory(self.accelerator.device).values()])))
        super().log(logs, start_time)


def start_processes(arguments: Mapping[str, Any]) -> object:
    """See `build.Builders`."""
    return topology.start_processes(arguments)


def sft_trainer(build: Build[SFTOptionSet]) -> TandemSFTTrainer:
    """See `build.Builders`."""
    run, max_length = build.run, build.run.text.max_length
    layout: Layout = "padded" if has_hpu() else run.train.layout
    longest = max(len(ids) for examples in build.splits.values() for ids in examples["input_ids"])
    splits = build.datasets | {"train_dataset": packed(build.splits["train_dataset"], run)}
    with pair_engine(layout=layout, longest=min(longest, run.text.limit)):
        trainer = TandemSFTTrainer(
            model=build.policy,
            args=SFTConfig(
                **build.arguments,
                max_length=max_length,
                loss_type=run.train.loss_type,
                pad_to_multiple_of=max_length if has_hpu() else None,  # an HPU compiles anew for every shape
            ),
            processing_class=build.tokenizer,
            peft_config=lora_config(run.lora, run.model, build.policy),
            undealt=functools.partial(why_undealt, run.train, None),
            **splits,
        )
    if not has_hpu():  # TRL's collator leaves it to a kernel to keep the examples of a row apart
        trainer.data_collator = ExampleCollator(build.tokenizer.pad_token_id, run.text.limit, layout=layout)
    return trainer


def dpo_trainer(build: Build[DPOOptionSet]) -> TandemDPOTrainer:
    """See `build.Builders`."""
    run, max_length = build.run, build.run.text.max_length
    dpo, engine = run.dpo, run.engine
    if engine.token_budget is not None:
        check_budget(run, build.policy.config.get_text_config())
    loss_types, loss_weights = dpo.trl_losses
    if has_hpu():  # which compiles anew for every shape
        engine = dataclasses.replace(engine, layout="padded")
    return TandemDPOTrainer(
        model=build.policy,
        ref_model=build.reference,
        args=DPOConfig(
            **build.arguments,
            **handed_on(dpo),
            max_length=max_length,
            loss_type=loss_types,
            loss_weights=loss_weights,
        ),
        processing_class=build.tokenizer,
        peft_config=lora_config(run.lora, run.model, build.policy),
        engine=engine,
        monitor=run.monitor,
        logs_dir=build.logs_dir,
        dpo=dpo,
        reference_source=reference_source(run),
        data_collator=PairCollator(build.tokenizer.pad_token_id, max_length, static=has_hpu()),
        undealt=functools.partial(why_undealt, run.train, dpo),
        **build.datasets,
    )


def reference_source(run: DPOOptionSet) -> Source:
    """The files that the reference is read from; none if its weights are not just those of files."""
    if named := run.dpo.reference_model:
        own = dataclasses.replace(run.model, model_name_or_path=named, model_revision=None)
        return Source([] if is_adapter(named) else weight_files(own), own.dtype)
    added = lora_config(run.lora, run.model)
    changed = run.lora.load_in_4bit or (added is not None and not starts_as_its_base(added))
    return Source([] if changed else weight_files(run.model), run.model.dtype)
