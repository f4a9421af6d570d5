"""What the trainers of TRL and of optimum-habana have in common: complete checkpoints, reference cache, monitor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, tqdm
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader

from tandem.data.tokenized import SIDES
from tandem.engine.lengths import PairLengths, token_arrays
from tandem.engine.modes import evaluating
from tandem.engine.pairs import PairCollator
from tandem.engine.precision import computed_in
from tandem.engine.ref_cache import RefCache, pair_key
from tandem.log import logger
from tandem.monitor.callback import MonitorCallback
from tandem.monitor.gather import MicroBatch, Sampling
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions
from tandem.training.trainers.checkpoints import CompleteCheckpoints
from tandem.training.trainers.reference import check_gap, gap, starts_as_its_base


class PairTrainer(CompleteCheckpoints):
    """Mixin over a DPO trainer on tokenized pairs (`data.tokenized.tokenize_pair`) with their `pair_id`.

    The reference's log-probs are read from the cache, or computed before training and kept there. The monitor is fed
    with every pair, and its state and the trainer's counters are in every checkpoint.
    """

    model: Any
    model_wrapped: Any
    ref_model: Any
    data_collator: PairCollator
    train_dataset: Any
    beta: float
    ld_alpha: float | None
    monitor: Monitor
    _ref_cache: RefCache | None
    """None in a run whose losses need no reference."""
    _precompute_model_hash: str
    _reference_name: str | None
    """Of the model that is the reference; None where it is the policy before training."""
    _added_adapter: PeftConfig | None
    """Of the adapter that the policy was given for this run."""
    _logps: Any
    """(model, batch) → summed log-probs of chosen and of rejected answers, (B,) nats each."""
    _prepare_inputs: Any
    _reference_checked = False

    @contextlib.contextmanager
    def _reference_ready(self) -> Iterator[Any]:
        """The reference, ready to be forwarded on all ranks."""
        yield self.ref_model or self.model

    def _gather_scores(self, logps: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probs of all ranks, each pair once. Collective."""
        gathered: tuple[torch.Tensor, torch.Tensor] = self.accelerator.gather_for_metrics(logps)
        return gathered

    def _with_adapter(self) -> bool:
        """Whether the reference, where it has an adapter, is scored with it."""
        return self.ref_model is not None or not starts_as_its_base(self._added_adapter)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's log-probs of chosen and of rejected answers, (B,) nats each."""
        off: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel) and not self._with_adapter():
            off = policy.disable_adapter()
        with torch.no_grad(), evaluating(model), off, self._autocast():
            logps: tuple[torch.Tensor, torch.Tensor] = self._logps(model, inputs)
        return logps

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that the policy is forwarded in."""
        context: contextlib.AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        if not self._reference_checked:
            self._reference_checked = True
            self._check_reference(model, self._prepare_inputs(inputs))
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **keywords)  # type: ignore[misc]
        return loss

    def _check_reference(self, model: Any, inputs: dict[str, Any]) -> None:
        """Before the first update of a run that is not resumed: see `check_gap`. Collective."""
        if self._ref_cache is None or self._reference_name is not None or self.state.global_step > 0:
            return
        device = inputs["input_ids"].device
        with torch.no_grad(), evaluating(model), self._autocast():
            policy = torch.cat(self._logps(model, inputs))
            computed = computed_in(model, device.type)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        found = gap(policy, reference.to(policy), inputs["completion_mask"][:, 1:].sum(1))
        check_gap(self.accelerator.gather(found[None]).max().item(), computed)

    def _reference_collator(self, batch_size: int) -> PairCollator:
        return self.data_collator

    def _add_monitor(self, options: MonitorOptions, logs_dir: Path, ranks_per_batch: int = 1) -> None:
        self.monitor = Monitor(
            options,
            logs_dir,
            self.accelerator,
            self.beta,
            save_checkpoint=lambda: self._save_checkpoint(self.model_wrapped, None),
            sampling=Sampling(len(self.train_dataset), ranks_per_batch, getattr(self, "_in_order", None)),
        )
        self.add_callback(MonitorCallback(self))  # type: ignore[attr-defined]

    # Reference

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's log-probs: from the cache, or computed and added to it batch by batch."""
        if self._ref_cache is None:  # TRL reads the columns all the same, for the rewards that it logs
            nothing = [0.0] * len(dataset)
            return dataset.add_column("ref_chosen_logps", nothing).add_column("ref_rejected_logps", nothing)
        keys = self._pair_keys(dataset)
        known = [self._ref_cache.read(keys) if self.accelerator.is_main_process else None]
        # Another run may add entries between the reads of two ranks, which would then forward different batches
        found: dict[bytes, tuple[float, float]] = broadcast_object_list(known)[0]
        missing = [index for index, key in enumerate(keys) if key not in found]
        hits = len(keys) - len(missing)
        logger.info("reference of %s pairs: %d of %d in %s", name, hits, len(keys), self._ref_cache.path)
        if missing:
            # A loader draws from the random numbers: a run must have the same left whether the cache was full or not
            with torch.random.fork_rng(devices=[]):
                found |= self._score_reference(dataset, keys, missing, name, batch_size)
        chosen, rejected = zip(*(found[key] for key in keys), strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))

    def _pair_keys(self, dataset: Dataset) -> list[bytes]:
        dtype = f"{self.model.dtype} under {self.accelerator.mixed_precision}"
        longest = self.data_collator.max_length
        keys = []
        columns = [name for name in dataset.column_names if name.endswith(("_ids", "_mask"))]
        for pair in token_arrays(dataset, columns):
            prompt = pair["prompt_ids"]
            rows = [np.concatenate([prompt, pair[f"{side}_ids"]])[:longest] for side in SIDES]
            masks = [pair.get(f"{side}_mask", np.ones(1, np.int32)) for side in SIDES]
            scored = [
                len(row) - len(prompt) if mask.all() else mask[: len(row) - len(prompt)]
                for row, mask in zip(rows, masks, strict=True)
            ]
            keys.append(pair_key(self._precompute_model_hash, rows, scored, dtype, self.ld_alpha))
        return keys

    def _score_reference(
        self, dataset: Dataset, keys: list[bytes], missing: list[int], name: str, batch_size: int
    ) -> dict[bytes, tuple[float, float]]:
        # Pairs of like length together, so that batches are alike in memory and time; the longest first, so that what
        # does not fit fails at once
        tokens = PairLengths.of(dataset, self.data_collator.max_length).tokens("packed")
        order = sorted(missing, key=lambda index: -tokens[index])
        collate = self._reference_collator(batch_size)
        loader = DataLoader(dataset.select(order), batch_size=batch_size, collate_fn=collate)
        scores: dict[bytes, tuple[float, float]] = {}
        done = 0  # more than there are scores, where a pair is there twice
        writes = self.accelerator.is_main_process and self._ref_cache is not None
        writer = self._ref_cache.writer() if writes and self._ref_cache else contextlib.nullcontext(lambda _: None)
        with self._reference_ready() as model, writer as write:
            for batch in tqdm(self.accelerator.prepare(loader), desc=f"reference of {name} pairs"):
                batch.pop("pair_id")
                gathered = self._gather_scores(self.compute_ref_log_probs(model, batch))
                values = torch.stack(gathered, dim=1)[: len(order) - done].tolist()
                some = {keys[order[done + row]]: tuple(pair) for row, pair in enumerate(values)}
                done += len(values)
                scores |= some
                write(some)
        return scores

    # Monitor and checkpoints

    def _feed_monitor(
        self,
        pair_ids: list[str],
        inputs: dict[str, Any],
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        loss: torch.Tensor,
        rewards: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`rewards` where they are not β times the log-ratios: margins are then their difference over β."""
        chosen_ratio = chosen - inputs["ref_chosen_logps"]
        rejected_ratio = rejected - inputs["ref_rejected_logps"]
        micro_batch = MicroBatch.of(
            pair_ids,
            chosen_ratio - rejected_ratio if rewards is None else (rewards[0] - rewards[1]) / self.beta,
            (chosen, rejected),
            loss,
            tokens=inputs["attention_mask"].sum(),
            # Schulman's k2 estimator of KL, http://joschu.net/blog/kl-approx.html, on the pair's answers: they are
            # not the policy's own, so it shows drift and does not measure KL
            kl=0.25 * (chosen_ratio**2 + rejected_ratio**2) if self._ref_cache is not None else None,
            batch=lambda: inputs,
        )
        self.monitor.add(micro_batch)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.accelerator.sync_gradients:
            self.monitor.collect(int(self.state.epoch or 0))  # its backward steps the optimizer as well

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.monitor.before_save(self.model)
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint:
            self.monitor.load(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)
