"""TRL's trainers on CPU, CUDA and MPS, with Tandem's engine, reference cache and monitor in their places."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer as trl_dpo_trainer

from tandem.devices import has_hpu
from tandem.engine.balance import Ints
from tandem.engine.forward import pair_engine
from tandem.engine.layout import IGNORED_LABEL, Layout
from tandem.engine.lengths import PairLengths, row_lengths
from tandem.engine.losses import Pairs, pair_losses, rewards
from tandem.engine.modes import disable_dropout
from tandem.engine.pairs import ExampleCollator, PairCollator, longest_row, sequence_logps
from tandem.engine.precision import is_sharded
from tandem.engine.ref_cache import RefCache, Source, fingerprint, source_key
from tandem.models.load import weight_files
from tandem.models.lora import lora_config
from tandem.monitor.memory import by_rank, read_memory
from tandem.monitor.options import MonitorOptions
from tandem.options.fields import handed_on
from tandem.options.losses import DPOOptions
from tandem.options.model import is_adapter
from tandem.options.training import EngineOptions
from tandem.ranks import is_first
from tandem.training.dealing import check_budget, pair_costs, why_undealt
from tandem.training.examples import packed
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.trainers import topology
from tandem.training.trainers.budget import TokenBudget
from tandem.training.trainers.build import Build
from tandem.training.trainers.checkpoints import CompleteCheckpoints, ContinuedLogs
from tandem.training.trainers.deferred import DeferredGather, Promise
from tandem.training.trainers.evenly import Evenly
from tandem.training.trainers.held_out import EachExampleOnce, EachPairOnce
from tandem.training.trainers.pair_trainer import PairTrainer
from tandem.training.trainers.reference import starts_as_its_base, without_trls_copy
from tandem.training.trainers.sharding import Sharded, of_rank_0, policy_is_reference, scoring


class TandemDPOTrainer(ContinuedLogs, EachPairOnce, TokenBudget, PairTrainer, Evenly, Sharded, DPOTrainer):
    """TRL's DPOTrainer on tokenized pairs (`data.tokenized.tokenize_pair`) with their `pair_id`.

    Policy and reference are forwarded by the pair engine. The reference's log-probs are read from the cache, or
    computed before training and kept there, so that no reference model is in memory while the policy trains.
    Losses, and the values of all metrics, are TRL's; losses that TRL lacks (`engine.losses`) are added to them.

    Args:
        dpo: says which losses are not TRL's, and whether there is a reference at all; None: all are TRL's.
        undealt: see `Evenly`.
        reference_source: that the reference was read from; by it, its fingerprint is remembered.
    """

    unit = "pairs"
    _signature_columns: list[str]
    _precompute_engine: Any  # TRL's: the DeepSpeed engine that its precomputation has made
    _total_train_tokens: Any  # a promise of TRL's count while its metrics are deferred

    def __init__(
        self,
        *,
        ref_model: PreTrainedModel | None = None,
        engine: EngineOptions,
        monitor: MonitorOptions,
        logs_dir: Path,
        dpo: DPOOptions | None = None,
        undealt: Callable[[Any], str | None] = lambda _: None,
        **keywords: Any,
    ) -> None:
        self._dpo = dpo or DPOOptions()
        self._ref_cache = RefCache(engine.ref_cache) if self._dpo.needs_reference else None
        self._layout, self._undealt, self._token_budget = engine.layout, undealt, engine.token_budget
        self._reference_source = keywords.pop("reference_source", Source())
        self._reference_name = ref_model.name_or_path if ref_model is not None else None
        splits = [keywords[name] for name in ("train_dataset", "eval_dataset") if keywords.get(name) is not None]
        # Laid out where batches are made, so that no step waits for it
        keywords["data_collator"] = dataclasses.replace(keywords["data_collator"], layout=engine.layout)
        longest = max(longest_row(pairs, keywords["data_collator"].max_length) for pairs in splits)
        self._added_adapter = keywords.get("peft_config")
        with (
            pair_engine(layout=engine.layout, longest=longest),
            _weights_hashed_by(self._remembered_hash, self._hash),
            policy_is_reference(ref_model),
            without_trls_copy(keywords["model"]),
        ):
            super().__init__(ref_model=ref_model, **keywords)
        self.ref_model = None
        if self.args.disable_dropout:
            disable_dropout(self.model)
        self._deferred = DeferredGather(self.accelerator)
        self._token_counts: list[Promise] = []
        self._add_monitor(monitor, logs_dir, ranks_per_batch=self._tp_size)

    def table_rows(self) -> dict[str, str]:
        if self._ref_cache is None:
            reference = f"none: {' '.join(self._dpo.loss_type)} needs none"
        else:
            whose = self._reference_name or "the policy before training"
            reference = f"{whose}, sharded like the policy; its log-probs come from {self._ref_cache.path}"
        return {"reference": reference, "layout": self._layout} | self._dealt_row() | self._budget_row()

    def _is_padded(self) -> bool:
        return self._layout == "padded"

    def _costs(self) -> Ints:
        lengths = PairLengths.of(self.train_dataset, self.data_collator.max_length)
        return pair_costs(lengths, self.model.config.get_text_config(), self._layout)

    def _hash(self, model: Any) -> str:
        """The reference's fingerprint, kept for the next run. Collective where the reference is sharded."""
        if self._ref_cache is None:
            return ""
        found = fingerprint(model, adapter=self._with_adapter())
        key = self._source_key(model)
        if key is not None and is_first():
            self._ref_cache.keep_fingerprint(key, found)
        return found

    def _remembered_hash(self, model: Any) -> str | None:
        key = self._source_key(model)
        return self._ref_cache.fingerprint_of(key) if self._ref_cache is not None and key is not None else None

    def _source_key(self, model: Any) -> bytes | None:
        return source_key(model, self._reference_source, adapter=self._with_adapter())

    @contextlib.contextmanager
    def _reference_ready(self) -> Iterator[Any]:
        model = self.ref_model or self._precompute_engine or self.model
        with scoring(model, self.accelerator) as ready:
            if self.is_deepspeed_enabled and self.ref_model is None:
                self._precompute_engine = ready  # of the training pairs, and again of the held-out ones
            yield ready

    def _logps(self, model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        text = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "labels": labels}
        per_token = model(**text, use_cache=False, fused_lm_head=True).log_probs
        chosen, rejected = sequence_logps(per_token, mask[:, 1:], self.ld_alpha).chunk(2)
        return chosen, rejected

    def _gather_scores(self, logps: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tp_size == 1:
            return super()._gather_scores(logps)
        # The ranks of a tensor-parallel group, neighbours, have the same pairs
        chosen, rejected = (
            self.accelerator.gather(side).view(-1, self._tp_size, len(side))[:, 0].flatten() for side in logps
        )
        return chosen, rejected

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = ("pair_id", "chosen_mask", "rejected_mask")
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ours]))

    # Loss and metrics

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        pair_ids = inputs.pop("pair_id")
        training = self.model.training
        if not training and not self._dpo.own_losses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        per_token: list[torch.Tensor] = []

        def policy(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            per_token.append(output.log_probs)
            return output

        with self._metrics_deferred() if training else contextlib.nullcontext():
            loss = super().compute_loss(policy, inputs, num_items_in_batch=num_items_in_batch)
            pairs = self._pairs(per_token[0], inputs)
            loss, logged = self._with_own_losses(loss, pairs)
        if training:
            chosen, rejected = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
            self._feed_monitor(pair_ids, inputs, chosen, rejected, loss, logged)
        return loss

    def _pairs(self, per_token: torch.Tensor, inputs: Mapping[str, Any]) -> Pairs:
        """What a loss is given, from the policy's (2B, S − 1) log-probs of tokens in nats."""
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = sequence_logps(per_token, mask, self.ld_alpha).chunk(2)
        chosen_lengths, rejected_lengths = mask.sum(1).clamp(min=1).chunk(2)
        scored = self._ref_cache is not None
        return Pairs(
            chosen,
            rejected,
            ref_chosen_logps=inputs["ref_chosen_logps"] if scored else None,
            ref_rejected_logps=inputs["ref_rejected_logps"] if scored else None,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self.beta,
            options=self._dpo,
        )

    def _with_own_losses(
        self, loss: Any, pairs: Pairs
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """TRL's `loss` and those it lacks; and the rewards of the first loss, where they are not those TRL logs."""
        for own, weight in self._dpo.own_losses:
            loss = loss + weight * pair_losses(own, pairs).mean()
        first = self._dpo.losses[0][0]
        if first.rewards is None:
            return loss, None
        chosen, rejected = rewards(first, pairs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in {
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).float(),
            "margins": chosen - rejected,
        }.items():
            metrics[f"rewards/{name}"][-1] = self.accelerator.gather(values).mean().item()
        return loss, (chosen, rejected)

    @contextlib.contextmanager
    def _metrics_deferred(self) -> Iterator[None]:
        accelerator, counted = self.accelerator, self._total_train_tokens
        self.accelerator, self._total_train_tokens = self._deferred, 0
        try:
            yield
        finally:
            self._token_counts.append(self._total_train_tokens)
            self.accelerator, self._total_train_tokens = accelerator, counted

    def _resolve_metrics(self) -> None:
        """Turn what TRL's metrics were promised into numbers. Collective."""
        if not self._token_counts:
            return
        self._deferred.collect()
        metrics = self._metrics["train"]
        self._total_train_tokens += int(sum(count.value() for count in self._token_counts))
        self._token_counts = []
        for name, values in metrics.items():
            metrics[name] = [float(value.value()) if isinstance(value, Promise) else value for value in values]
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            self._resolve_metrics()
            logs.update(self.monitor.interval_logs())
        super().log(logs, start_time)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.monitor.add_grad_norm(grad_norm)
        return grad_norm

    # Checkpoints

    def _counters(self) -> dict[str, Any]:
        self._resolve_metrics()
        return super()._counters()


@contextlib.contextmanager
def _weights_hashed_by(remembered: Callable[[Any], str | None], function: Callable[[Any], str]) -> Iterator[None]:
    """While TRL's constructor runs, its hash of the reference is ours: taken at the same moment, cheaper, and blind
    to adapters that are off."""
    original = trl_dpo_trainer.hash_module

    def hash_module(model: Any) -> Any:
        main = PartialState().is_main_process
        found = of_rank_0(remembered(model) if main else None)
        if found is None:
            # Where each rank has the whole, one hashes it; a part's hash is a collective
            found = of_rank_0(function(model) if main or is_sharded(model) else None)
        return found

    trl_dpo_trainer.hash_module = hash_module
    try:
        yield
    finally:
        trl_dpo_trainer.hash_module = original


class TandemSFTTrainer(ContinuedLogs, EachExampleOnce, CompleteCheckpoints, Evenly, Sharded, SFTTrainer):
    """TRL's SFTTrainer, which also logs the memory of every rank.

    Args:
        undealt: see `Evenly`.
    """

    unit = "examples"

    def __init__(self, *arguments: Any, undealt: Callable[[Any], str | None], **keywords: Any) -> None:
        self._undealt = undealt
        super().__init__(*arguments, **keywords)

    def table_rows(self) -> dict[str, str]:
        return self._dealt_row()

    def _is_padded(self) -> bool:
        return getattr(self.data_collator, "layout", "padded") == "padded"

    def _costs(self) -> Ints:
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
    splits = build.splits | {"train_dataset": packed(build.splits["train_dataset"], run)}
    with pair_engine(layout=layout, longest=min(longest, max_length)):
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
        trainer.data_collator = ExampleCollator(build.tokenizer.pad_token_id, max_length, layout=layout)
    return trainer


def dpo_trainer(build: Build[DPOOptionSet]) -> TandemDPOTrainer:
    """See `build.Builders`."""
    run, max_length = build.run, build.run.text.max_length
    dpo, engine = run.dpo, run.engine
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
            precompute_ref_log_probs=True,  # our cache takes the place of TRL's, see TandemDPOTrainer
        ),
        processing_class=build.tokenizer,
        peft_config=lora_config(run.lora, run.model, build.policy),
        engine=engine,
        monitor=run.monitor,
        logs_dir=build.logs_dir,
        dpo=dpo,
        reference_source=_reference_source(run),
        data_collator=PairCollator(build.tokenizer.pad_token_id, max_length, static=has_hpu()),
        undealt=functools.partial(why_undealt, run.train, dpo),
        **build.splits,
    )


def _reference_source(run: DPOOptionSet) -> Source:
    """What the reference is read from; of no files where its weights are more than what files hold."""
    if named := run.dpo.reference_model:
        own = dataclasses.replace(run.model, model_name_or_path=named, model_revision=None)
        return Source([] if is_adapter(named) else weight_files(own), own.dtype)
    added = lora_config(run.lora, run.model)
    changed = run.lora.load_in_4bit or (added is not None and not starts_as_its_base(added))
    return Source([] if changed else weight_files(run.model), run.model.dtype)
