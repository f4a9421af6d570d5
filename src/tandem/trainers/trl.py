"""TRL's trainers on CPU, CUDA and MPS, with Tandem's engine, reference cache and monitor in their places."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list, tqdm
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer as trl_dpo_trainer

from tandem.engine.forward import pair_engine
from tandem.engine.pairs import PairCollator, sequence_logps
from tandem.engine.ref_cache import RefCache, fingerprint, pair_key
from tandem.log import logger
from tandem.models import has_hpu, lora_config
from tandem.monitor.callback import Monitor, MonitorCallback
from tandem.monitor.options import MonitorOptions
from tandem.options import DPOOptions, EngineOptions, LoraOptions, TextOptions
from tandem.runs import write_json, write_manifest
from tandem.trainers.deferred import DeferredGather, Promise

_COUNTERS = "tandem_counters.json"


class _CompleteCheckpoints:
    """Mixin over transformers' Trainer: a checkpoint counts once its manifest, written last, is there."""

    args: Any
    state: Any
    accelerator: Any

    def checkpoint_folder(self) -> Path:
        """Where a checkpoint of the current step goes."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Older checkpoints may go only when this one is complete, so Trainer must not rotate by itself
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(self.checkpoint_folder())
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)


class TandemDPOTrainer(_CompleteCheckpoints, DPOTrainer):
    """TRL's DPOTrainer on tokenized pairs (`data.texts.tokenize_pair`) with their `pair_id`.

    Policy and reference are forwarded by the pair engine. The reference's log-probs are read from the cache, or
    computed before training and kept there, so that no reference model is in memory while the policy trains.
    Losses, and the values of all metrics, are TRL's.
    """

    _signature_columns: list[str]
    _total_train_tokens: Any  # a promise of TRL's count while its metrics are deferred

    def __init__(
        self, *arguments: Any, engine: EngineOptions, monitor: MonitorOptions, logs_dir: Path, **keywords: Any
    ) -> None:
        self._ref_cache = RefCache(engine.ref_cache)
        with pair_engine(engine.layout), _weights_hashed_by(fingerprint):
            super().__init__(*arguments, **keywords)
        self.ref_model = None
        self._deferred = DeferredGather(self.accelerator)
        self._token_counts: list[Promise] = []
        self.monitor = Monitor(
            monitor,
            logs_dir,
            self.accelerator,
            self.beta,
            save_checkpoint=lambda: self._save_checkpoint(self.model_wrapped, None),
            epoch_pairs=len(self.train_dataset),
            ranks_per_batch=self._tp_size,
        )
        self.add_callback(MonitorCallback(self))

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "pair_id"]))

    # Reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's log-probs: from the cache, or computed and added to it batch by batch."""
        keys = self._pair_keys(dataset)
        known = [self._ref_cache.read(keys) if self.accelerator.is_main_process else None]
        # Another run may add entries between the reads of two ranks, which would then forward different batches
        found: dict[bytes, tuple[float, float]] = broadcast_object_list(known)[0]
        missing = [index for index, key in enumerate(keys) if key not in found]
        hits = len(keys) - len(missing)
        logger.info("reference of %s pairs: %d of %d in %s", name, hits, len(keys), self._ref_cache.path)
        if missing:
            found |= self._score_reference(dataset, keys, missing, name, batch_size)
        chosen, rejected = zip(*(found[key] for key in keys), strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))

    def _pair_keys(self, dataset: Dataset) -> list[bytes]:
        dtype = f"{self.model.dtype} under {self.accelerator.mixed_precision}"
        longest = self.data_collator.max_length
        keys = []
        for pair in dataset:
            prompt = pair["prompt_ids"]
            rows = [(prompt + pair[side])[:longest] for side in ("chosen_ids", "rejected_ids")]
            scored = [len(row) - len(prompt) for row in rows]
            keys.append(pair_key(self._precompute_model_hash, rows, scored, dtype, self.ld_alpha))
        return keys

    def _score_reference(
        self, dataset: Dataset, keys: list[bytes], missing: list[int], name: str, batch_size: int
    ) -> dict[bytes, tuple[float, float]]:
        # Pairs of like length together, so that batches are alike in memory and time
        sides = ("prompt_ids", "chosen_ids", "rejected_ids")
        order = sorted(missing, key=lambda index: sum(len(dataset[index][side]) for side in sides))
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=self.data_collator)
        model = self.ref_model or self.model
        scores: dict[bytes, tuple[float, float]] = {}
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"reference of {name} pairs"):
            batch.pop("pair_id")
            gathered = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            values = torch.stack(gathered, dim=1).tolist()
            some = {keys[order[len(scores) + row]]: tuple(pair) for row, pair in enumerate(values)}
            scores |= some
            if self.accelerator.is_main_process:
                self._ref_cache.write(some)
        return scores

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
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        per_token: list[torch.Tensor] = []

        def policy(*args: Any, **kwargs: Any) -> Any:
            output = model(*args, **kwargs)
            per_token.append(output.log_probs.detach())
            return output

        with self._metrics_deferred():
            loss = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        self._feed_monitor(pair_ids, inputs, per_token[0], loss)
        return loss

    def _feed_monitor(
        self, pair_ids: list[str], inputs: dict[str, Any], per_token: torch.Tensor, loss: torch.Tensor
    ) -> None:
        logps = sequence_logps(per_token, inputs["completion_mask"][:, 1:], self.ld_alpha)
        chosen, rejected = logps.chunk(2)
        chosen_ratio = chosen - inputs["ref_chosen_logps"]
        rejected_ratio = rejected - inputs["ref_rejected_logps"]
        self.monitor.add(
            pair_ids,
            chosen_ratio - rejected_ratio,
            chosen,
            rejected,
            loss,
            tokens=inputs["attention_mask"].sum(),
            # Schulman's k2 estimator of KL, http://joschu.net/blog/kl-approx.html, on the pair's answers: they are
            # not the policy's own, so it shows drift and does not measure KL
            kl=0.25 * (chosen_ratio**2 + rejected_ratio**2),
            batch=lambda: inputs,
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.accelerator.sync_gradients:
            self.monitor.collect(int(self.state.epoch or 0))  # its backward steps the optimizer as well

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

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = self.checkpoint_folder()
        self.monitor.save(folder, self.model)
        self._resolve_metrics()
        if self.args.should_save:
            counters = {"num_tokens": self._total_train_tokens, "metrics": self._metrics["train"]}
            write_json(folder / _COUNTERS, counters)
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint:
            self.monitor.load(resume_from_checkpoint)
            counters = json.loads((Path(resume_from_checkpoint) / _COUNTERS).read_text())
            self._total_train_tokens = counters["num_tokens"]
            self._metrics["train"].update(counters["metrics"])
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)


@contextlib.contextmanager
def _weights_hashed_by(function: Any) -> Iterator[None]:
    """While TRL's constructor runs, its hash of the reference is ours: taken at the same moment, cheaper, and blind
    to adapters that are off."""
    original = trl_dpo_trainer.hash_module
    trl_dpo_trainer.hash_module = function
    try:
        yield
    finally:
        trl_dpo_trainer.hash_module = original


class TandemSFTTrainer(_CompleteCheckpoints, SFTTrainer):
    """TRL's SFTTrainer."""


def sft_trainer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: dict[str, Any],
    text: TextOptions,
    lora: LoraOptions,
    splits: dict[str, Dataset],
) -> TandemSFTTrainer:
    """The trainer of prompt + completion.

    Args:
        arguments: of TrainingArguments.
        splits: rendered examples by the trainer's argument names.
    """
    return TandemSFTTrainer(
        model=policy,
        args=SFTConfig(
            **arguments,
            max_length=text.max_length,
            pad_to_multiple_of=text.max_length if has_hpu() else None,  # an HPU compiles anew for every shape
        ),
        processing_class=tokenizer,
        peft_config=lora_config(lora),
        **splits,
    )


def dpo_trainer(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    arguments: dict[str, Any],
    text: TextOptions,
    lora: LoraOptions,
    dpo: DPOOptions,
    engine: EngineOptions,
    monitor: MonitorOptions,
    logs_dir: Path,
    splits: dict[str, Dataset],
) -> TandemDPOTrainer:
    """The trainer of pairs.

    Args:
        reference: None for the policy as it is now.
        arguments: of TrainingArguments.
        splits: tokenized pairs by the trainer's argument names.
    """
    loss_types, loss_weights = dpo.trl_losses
    if has_hpu():  # which compiles anew for every shape
        engine = dataclasses.replace(engine, layout="padded")
    return TandemDPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            **arguments,
            max_length=text.max_length,
            disable_dropout=dpo.disable_dropout,
            beta=dpo.beta,
            loss_type=loss_types,
            loss_weights=loss_weights,
            label_smoothing=dpo.label_smoothing,
            f_divergence_type=dpo.f_divergence_type,
            f_alpha_divergence_coef=dpo.f_alpha_divergence_coef,
            ld_alpha=dpo.ld_alpha,
            discopop_tau=dpo.discopop_tau,
            use_weighting=dpo.use_weighting,
            precompute_ref_log_probs=True,  # our cache takes the place of TRL's, see TandemDPOTrainer
        ),
        processing_class=tokenizer,
        peft_config=lora_config(lora),
        engine=engine,
        monitor=monitor,
        logs_dir=logs_dir,
        data_collator=PairCollator(tokenizer.pad_token_id, text.max_length, static=has_hpu()),
        **splits,
    )
