"""The base of all of Tandem's trainers, on TRL and on optimum-habana: transformers' hooks, answered by parts."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from tandem.errors import UserError
from tandem.monitor.monitor import Monitor
from tandem.training.trainers.checkpoints import CheckpointState
from tandem.training.trainers.held_out import HeldOut
from tandem.training.trainers.reference_scorer import ReferenceScorer


class TandemTrainer(Trainer):
    """A transformers Trainer that passes calls of its hooks on to the parts that it holds.

    A trainer inherits from it first, and then from the library's class that it builds on.

    Attributes:
        checkpoints: its checkpoints, complete or absent.
        held_out: the sums of the evaluation under way.
        reference, monitor: of a trainer of pairs; None in SFT.
    """

    reference: ReferenceScorer | None = None
    monitor: Monitor | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.checkpoints, self.held_out = CheckpointState(self), HeldOut(self)
        super().__init__(*arguments, **keywords)

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of counts and of metrics not yet logged. Collective."""
        raise NotImplementedError

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        raise NotImplementedError

    def save_beside(self, folder: Path) -> None:
        """Write what a resumed run of this kind needs besides weights, optimizer and counters. By one process."""

    def renew_card(self) -> None:
        """Write the model's card again if a checkpoint has brought one, which a kill may have torn."""

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint:
            if self.monitor is not None:
                self.monitor.load(resume_from_checkpoint)
            self.restore_counters(self.checkpoints.resume(resume_from_checkpoint))
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)
        if self.args.should_save:  # a run that was killed after its last save has no further save that does this
            self.checkpoints.remove_older()
        return result

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> torch.Tensor:
        if self.reference is not None:
            self.reference.check_once(model, inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **keywords)
        return loss

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list[Any], Any]:
        """The batches of the next step; none if the run resumes from a checkpoint of the last step. transformers looks
        at `max_steps` only after a step, and would train one too many."""
        if self.checkpoints.nothing_left():
            return [], None
        samples: tuple[list[Any], Any] = super().get_batch_samples(*arguments, **keywords)
        return samples

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> Any:
        self.held_out.begin()
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **keywords)
        output.metrics.update(self.held_out.results(metric_key_prefix))
        return output

    def _maybe_log_save_evaluate(self, *arguments: Any, **keywords: Any) -> None:
        if self.checkpoints.nothing_left():
            self.checkpoints.end_again()
        super()._maybe_log_save_evaluate(*arguments, **keywords)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            better: bool = super()._determine_best_metric(metrics=metrics, trial=trial)
        except KeyError:
            asked, there = self.args.metric_for_best_model, ", ".join(sorted(metrics))
            raise UserError(f"--metric_for_best_model {asked}: an evaluation has {there}") from None
        return better

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.monitor is not None:
            self.monitor.before_save(self.model)
        with self.checkpoints.completed(self.counters()):
            super()._save_checkpoint(model, trial)
