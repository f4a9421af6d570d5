"""optimum-habana's trainers on Intel Gaudi, with Tandem's batches, log-probs, reference cache and monitor.

Imports with optimum-habana 1.21 and TRL 0.9.6 only. On an HPU each new shape is compiled, and each look at a value
waits for the device: so every batch has one shape, nothing is selected by a mask, and values are read once a step, by
the monitor.
"""

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.habana import GaudiConfig, GaudiTrainer
from optimum.habana.trl import GaudiDPOConfig, GaudiDPOTrainer, GaudiSFTConfig, GaudiSFTTrainer
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.utils import CONFIG_NAME

from tandem.engine.layout import IGNORED_LABEL
from tandem.engine.losses import Pairs, pair_losses, rewards
from tandem.engine.modes import disable_dropout
from tandem.engine.pairs import ExampleCollator, PairCollator, completion_logps, sequence_logps
from tandem.engine.ref_cache import RefCache
from tandem.errors import UserError
from tandem.log import logger
from tandem.models.habana import is_lazy
from tandem.models.lora import lora_config
from tandem.monitor.monitor import Monitor
from tandem.options.training import GaudiOptions
from tandem.runs import write_json
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.trainers.base import TandemTrainer
from tandem.training.trainers.build import Build
from tandem.training.trainers.gaudi_settings import (
    gaudi_config,
    model_flags,
    refuse_columns,
    row_length,
    training_arguments,
)
from tandem.training.trainers.monitored import MonitorFeed
from tandem.training.trainers.reference_scorer import Logps, ReferenceScorer


class _OnGaudi(TandemTrainer):
    """A GaudiTrainer: transformers' own order of the data, and batches of one shape."""

    data_collator: Any

    # optimum-habana's sampler fills the last batch with other rows drawn at random, which then count twice
    _get_train_sampler = Trainer._get_train_sampler

    def _prepare_forward(self, gaudi: GaudiOptions, max_length: int) -> None:
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        config = base.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            raise UserError("the router's auxiliary loss is not there on Gaudi: set output_router_logits to false")
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        accepted = inspect.signature(type(base).forward).parameters
        self._flags = model_flags(
            gaudi, accepted, lazy=self.args.use_lazy_mode, window=window if window and window < max_length else None
        )

    def _token_logps(self, model: Any, inputs: dict[str, Any], completion_mask: torch.Tensor) -> torch.Tensor:
        """(N, S − 1) nats, of right-padded rows; with the flags the run asked for, which the stock forward drops."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **self._flags).logits
        return completion_logps(logits, ids, completion_mask)

    def get_batch_samples_transformers(self, *arguments: Any, **keywords: Any) -> tuple[list[Any], Any]:
        """transformers' `get_batch_samples`, under the name that optimum-habana calls."""
        if self.checkpoints.nothing_left():
            return [], None
        samples: tuple[list[Any], Any] = super().get_batch_samples_transformers(*arguments, **keywords)
        return samples

    def get_train_dataloader(self) -> DataLoader:
        return GaudiTrainer.get_train_dataloader(self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        collator, size = self.data_collator, self.args.per_device_eval_batch_size
        self.data_collator = dataclasses.replace(collator, size=size)
        try:
            return GaudiTrainer.get_eval_dataloader(self, eval_dataset)
        finally:
            self.data_collator = collator

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        file = Path(output_dir or self.args.output_dir) / CONFIG_NAME
        if file.exists():
            # It names optimum-habana's class, which other loaders that go by this name (vLLM) do not know
            config = json.loads(file.read_text())
            config["architectures"] = [name.removeprefix("Gaudi") for name in config["architectures"]]
            write_json(file, config)

    def end(self) -> None:
        """Finish the trackers and destroy the process group, as transformers 5 does."""
        self.accelerator.end_training()


class _Scorer(ReferenceScorer):
    """Forwards in the one shape and precision that the policy is compiled for."""

    def collator(self, batch_size: int) -> PairCollator:
        return dataclasses.replace(self._trainer.data_collator, size=batch_size)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = self._trainer.compute_loss_context_manager()
        return context


class TandemGaudiDPOTrainer(_OnGaudi, GaudiDPOTrainer):
    """optimum-habana's GaudiDPOTrainer on tokenized pairs with their `pair_id`, with TRL 1.16's numbers.

    The losses are those of TRL 0.9.6, which it calls. Against the stock class: accumulation is a mean over its
    micro-batches; the reference's log-probs come from the cache; attention flags reach the model; an incomplete batch
    is filled up with copies of weight 0; metrics are means over all ranks, read when they are logged.
    """

    reference: ReferenceScorer
    monitor: Monitor
    train_dataset: Any
    eval_dataset: Any
    _stored_metrics: dict[str, dict[str, list[torch.Tensor]]]

    def __init__(
        self,
        *arguments: Any,
        ref_model: PreTrainedModel | None,
        run: DPOOptionSet,
        logs_dir: Path,
        **keywords: Any,
    ) -> None:
        self._dpo = run.dpo
        cache = RefCache(run.engine.ref_cache) if run.dpo.needs_reference else None
        # Not given the reference: the stock class would record it as an HPU graph, even in eager mode
        super().__init__(*arguments, **keywords)
        self.ld_alpha = run.dpo.ld_alpha
        self._prepare_forward(run.gaudi, self.data_collator.max_length)
        self._grad_norm: torch.Tensor | None = None
        self._tokens = torch.zeros((), device=self.args.device)
        self.accelerator.clip_grad_norm_ = self._recorded(self.accelerator.clip_grad_norm_)
        self.reference = _Scorer(self, cache, self._logps, given=ref_model, added=keywords.get("peft_config"))
        self.reference.identify(self.accelerator.unwrap_model(self.model) if ref_model is None else ref_model)
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if self.args.disable_dropout:
            disable_dropout(self.model)
        self._score_reference()
        self.feed = MonitorFeed(self, run.monitor, logs_dir, scored=cache is not None)

    @staticmethod
    def tokenize_row(row: dict[str, Any]) -> dict[str, Any]:
        return row

    def _score_reference(self) -> None:
        """Log-probs of the reference, while policy and reference are still the same model."""
        size = self.args.per_device_train_batch_size  # the shape of training, which is compiled anyway
        self.train_dataset = self.reference.with_columns(self.train_dataset, "train", size)
        if self.eval_dataset is not None:
            self.eval_dataset = self.reference.with_columns(self.eval_dataset, "eval", size)
        self.ref_model = None

    # Loss and metrics

    def _logps(self, model: Any, inputs: dict[str, Any]) -> Logps:
        mask = inputs["completion_mask"]
        per_token = self._token_logps(model, inputs, mask)
        chosen, rejected = sequence_logps(per_token, mask[:, 1:], self.ld_alpha).chunk(2)
        return chosen, rejected

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        chosen, rejected = self._logps(model, inputs)
        loss, metrics, logged = self._loss_and_metrics(chosen, rejected, inputs)
        self.store_metrics(metrics, "train")
        self.feed.add(inputs["pair_id"], inputs, (chosen.detach(), rejected.detach()), loss, logged)
        self._tokens = self._tokens + (inputs["attention_mask"].sum(1) * inputs["pair_weights"].repeat(2)).sum()
        # The stock training step adds micro-batches up, where transformers takes their mean
        return loss / self.current_gradient_accumulation_steps

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        inputs["pair_weights"] = inputs["pair_weights"] * self.held_out.is_own(inputs["pair_weights"])
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics, _ = self._loss_and_metrics(*self._logps(model, inputs), inputs)
        self.held_out.add({"loss": loss, **metrics}, inputs["pair_weights"].sum())
        return loss, None, None

    def _loss_and_metrics(
        self, chosen: torch.Tensor, rejected: torch.Tensor, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
        """The loss and the metrics, () each, on the device: means over the batch's pairs without those that fill it up.
        And the rewards, (B,) each, if they are not β times the log-ratios."""
        references = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        weights = batch["pair_weights"] / batch["pair_weights"].sum()
        lengths = batch["completion_mask"].sum(1).clamp(min=1).chunk(2)
        scored = self.reference.cache is not None
        pairs = Pairs(
            chosen,
            rejected,
            ref_chosen_logps=references[0] if scored else None,
            ref_rejected_logps=references[1] if scored else None,
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            beta=self.beta,
            options=self._dpo,
        )
        loss = (self._losses(pairs, references) * weights).sum()
        first = self._dpo.losses[0][0]
        chosen_rewards, rejected_rewards = rewards(first, pairs)
        chosen, rejected = chosen.detach(), rejected.detach()
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        means = {name: (values * weights).sum() for name, values in metrics.items()}
        return loss, means, None if first.rewards is None else (chosen_rewards, rejected_rewards)

    def _losses(self, pairs: Pairs, references: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(B,) each pair's weighted sum of the run's losses."""
        logps = (pairs.chosen_logps, pairs.rejected_logps, *references)
        lengths = [pairs.chosen_lengths, pairs.rejected_lengths]
        # IPO takes means over tokens, in every version of TRL, which IPO's authors have confirmed
        means = [values / length for values, length in zip(logps, [*lengths, *lengths], strict=True)]
        total = torch.zeros_like(pairs.chosen_logps)
        for loss, weight in self._dpo.losses:
            if loss.per_pair is not None:
                total = total + weight * pair_losses(loss, pairs)
                continue
            self.loss_type = loss.name
            total = total + weight * self.dpo_loss(*(means if loss.name == "ipo" else logps))[0]
        return total

    def _averages(self, kind: str) -> dict[str, float]:
        """Means of the metrics stored since the last log, over all ranks. Collective; waits for the device."""
        stored = self._stored_metrics.pop(kind, {})
        if not stored:
            return {}
        means = torch.stack([torch.stack(values).mean() for values in stored.values()])
        over_ranks = self.accelerator.gather(means).view(-1, len(stored)).mean(0)
        return dict(zip(stored, over_ranks.tolist(), strict=True))

    def _num_tokens(self) -> int:
        return int(self.accelerator.gather(self._tokens[None]).sum())

    def log(self, logs: dict[str, float], start_time: float | None = None, **_: Any) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(self._averages("train"))
            logs["num_tokens"] = self._num_tokens()
            if self._grad_norm is not None:
                logs["grad_norm"] = self._grad_norm.item()
            logs.update(self.monitor.interval_logs())
        GaudiTrainer.log(self, logs, start_time)

    # Gradient norm

    def _recorded(self, clip: Any) -> Any:
        def recorded(*arguments: Any, **keywords: Any) -> torch.Tensor:
            norm: torch.Tensor = clip(*arguments, **keywords)
            self._grad_norm = norm.detach().reshape(())
            self.monitor.add_grad_norm(self._grad_norm)
            return norm

        return recorded

    @property
    def FusedNorm(self) -> Any:
        """Intel's clipping kernel, or None; the training loop puts it here and calls its `clip_norm`."""
        return self._fused_norm

    @FusedNorm.setter
    def FusedNorm(self, kernel: Any) -> None:
        self._fused_norm = kernel
        if kernel is not None:
            kernel.clip_norm = self._recorded(kernel.clip_norm)

    # Checkpoints

    def counters(self) -> dict[str, Any]:
        stored = self._stored_metrics.get("train", {})
        metrics = {name: torch.stack(values).tolist() for name, values in stored.items()}
        return {"num_tokens": self._num_tokens(), "metrics": metrics}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self._tokens = self._tokens + counters["num_tokens"]
        for name, values in counters["metrics"].items():
            self._stored_metrics["train"][name] = list(torch.tensor(values, device=self.args.device))


class TandemGaudiSFTTrainer(_OnGaudi, GaudiSFTTrainer):
    """optimum-habana's GaudiSFTTrainer on tokenized examples, with the loss of TRL 1.16: on completions alone."""

    def __init__(self, *arguments: Any, gaudi: GaudiOptions, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.model_accepts_loss_kwargs = True  # so that the loop counts a step's completion tokens for `compute_loss`
        self._prepare_forward(gaudi, self.data_collator.max_length)

    def counters(self) -> dict[str, Any]:
        return {}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        pass

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        completions = (inputs["labels"] != IGNORED_LABEL).to(torch.int64)
        total = -self._token_logps(model, inputs, completions).sum()
        if num_items_in_batch is None:
            return total / completions.sum().clamp(min=1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total * ranks / num_items_in_batch

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        own = self.held_out.is_own(inputs["labels"])
        inputs["labels"] = inputs["labels"].masked_fill(own[:, None] == 0, IGNORED_LABEL)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.held_out.add({"loss": loss}, (inputs["labels"][:, 1:] != IGNORED_LABEL).sum())
        return loss, None, None


def start_processes(arguments: Mapping[str, Any]) -> None:
    """See `build.Builders`. Only the seed is set here: an adapter starts at random, and is made before the stock class
    sets the seed. optimum-habana's arguments connect the processes, which is early enough: each loads a whole model."""
    set_seed(arguments["seed"])


def sft_trainer(build: Build[SFTOptionSet]) -> TandemGaudiSFTTrainer:
    """See `build.Builders`."""
    run, max_length = build.run, row_length(build.run.text)
    return TandemGaudiSFTTrainer(
        model=build.policy,
        args=GaudiSFTConfig(
            **training_arguments(build.arguments, lazy=is_lazy(), graphs=True), packing=False, max_seq_length=max_length
        ),
        **_on_either(build),
        data_collator=ExampleCollator(
            build.tokenizer.pad_token_id, max_length, size=build.arguments["per_device_train_batch_size"]
        ),
        gaudi=run.gaudi,
    )


def dpo_trainer(build: Build[DPOOptionSet]) -> TandemGaudiDPOTrainer:
    """See `build.Builders`."""
    run, max_length = build.run, row_length(build.run.text)
    if run.engine.token_budget is not None:
        raise UserError("--token_budget is not there on Gaudi, where all batches have one shape")
    refuse_columns([name for pairs in build.splits.values() for name in pairs.column_names])
    logger.info("Gaudi: layout padded, every row %d tokens long, whatever --layout says", max_length)
    # No graphs if the reference is the policy without its adapter: a graph with the adapter could be replayed for it
    shared = build.reference is None and (run.lora.use_peft or isinstance(build.policy, PeftModel))
    return TandemGaudiDPOTrainer(
        model=build.policy,
        ref_model=build.reference,
        args=GaudiDPOConfig(
            **training_arguments(build.arguments, lazy=is_lazy(), graphs=not shared),
            beta=run.dpo.beta,
            label_smoothing=run.dpo.label_smoothing,
            disable_dropout=run.dpo.disable_dropout,
            max_length=max_length,
            max_prompt_length=max_length,  # the pairs are cut already
            precompute_ref_log_probs=True,  # ours; without it the stock class would copy the policy
        ),
        **_on_either(build),
        data_collator=PairCollator(
            build.tokenizer.pad_token_id, max_length, static=True, size=build.arguments["per_device_train_batch_size"]
        ),
        run=run,
        logs_dir=build.logs_dir,
    )


def _on_either(build: Build[Any]) -> dict[str, Any]:
    """Arguments that SFT's and DPO's trainers have in common."""
    return {
        "gaudi_config": GaudiConfig(**gaudi_config(build.arguments)),
        "tokenizer": build.tokenizer,
        "peft_config": lora_config(build.run.lora, build.run.model),
        **build.splits,
    }
