"""Feeds a trainer's monitor with every pair of every micro-batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from tandem.monitor.callback import MonitorCallback
from tandem.monitor.gather import MicroBatch, Sampling
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions
from tandem.training.trainers.reference_scorer import Logps


class MonitorFeed:
    """Adds a monitor to a trainer of pairs, and feeds it.

    Args:
        scored: whether the run has a reference.
        ranks_per_batch, in_order: see `Sampling`.
    """

    def __init__(
        self,
        trainer: Any,
        options: MonitorOptions,
        logs_dir: Path,
        *,
        scored: bool,
        ranks_per_batch: int = 1,
        in_order: Callable[[int, int, int], list[int]] | None = None,
    ) -> None:
        self._trainer, self._scored = trainer, scored
        trainer.monitor = Monitor(
            options,
            logs_dir,
            trainer.accelerator,
            trainer.beta,
            save_checkpoint=lambda: trainer._save_checkpoint(trainer.model_wrapped, None),
            sampling=Sampling(len(trainer.train_dataset), ranks_per_batch, in_order),
        )
        trainer.add_callback(MonitorCallback(trainer))

    def add(
        self,
        pair_ids: list[str],
        inputs: dict[str, Any],
        logps: Logps,
        loss: torch.Tensor,
        rewards: Logps | None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Add a micro-batch.

        Args:
            logps: the policy's, detached.
            rewards: if they are not β times the log-ratios; margins are then their difference over β.
            rows: the row of each pair, if rows have several.
        """
        chosen_ratio = logps[0] - inputs["ref_chosen_logps"]
        rejected_ratio = logps[1] - inputs["ref_rejected_logps"]
        trainer = self._trainer
        micro_batch = MicroBatch.of(
            pair_ids,
            chosen_ratio - rejected_ratio if rewards is None else (rewards[0] - rewards[1]) / trainer.beta,
            logps,
            loss,
            tokens=inputs["attention_mask"].sum(),
            # Schulman's k2 estimator of KL, http://joschu.net/blog/kl-approx.html, on the pair's answers: they are
            # not the policy's own, so it shows drift and does not measure KL
            kl=0.25 * (chosen_ratio**2 + rejected_ratio**2) if self._scored else None,
            batch=lambda: inputs,
        )
        micro_batch.rows = rows
        trainer.monitor.add(micro_batch)
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and trainer.accelerator.sync_gradients:
            trainer.monitor.collect(int(trainer.state.epoch or 0))  # its backward steps the optimizer as well
