"""Checkpoints that are complete or absent, and that hold all that a resumed run goes on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME, safe_globals  # transformers 4, of Gaudi, has it nowhere else
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tandem.errors import UserError
from tandem.models.adapters import sort_config
from tandem.runs import (
    CARD,
    COUNTERS,
    MANIFEST,
    RUN,
    checkpoints,
    discard,
    is_complete,
    step_of,
    sync,
    write_atomic,
    write_manifest,
)

# What transformers reads with torch.load; training_args.bin is written only
_PICKLES = ("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")

_FEWEST_STEPS = 0.001  # by which transformers divides a loss after no step


def refuse_code(checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose pickles hold anything but tensors and plain values, before one of them is used.

    Each is read with torch's restricted unpickler, as transformers will, but without the tensors' content.

    Raises:
        UserError: naming the file.
    """
    for file in sorted(file for pattern in _PICKLES for file in Path(checkpoint).glob(pattern)):
        try:
            with safe_globals():  # of NumPy's random state
                torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # a damaged pickle has the unpickler raise errors of many kinds
            raise UserError(
                f"{file}: not the plain tensors and numbers that training saves ({type(error).__name__}); nothing in "
                "it was run; remove this checkpoint, and the same command goes on from the one before"
            ) from error


def steps_done(checkpoint: str | Path) -> int:
    """Optimizer steps before a checkpoint, as its trainer counted them."""
    steps: int = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]
    return steps


def _is_cut_off(checkpoint: Path) -> bool:
    """Whether it is a checkpoint of Tandem that a kill has left without a manifest: written, or removed, in part."""
    names = {file.name for file in checkpoint.iterdir()}
    return MANIFEST not in names and (not names or bool(names & {RUN, COUNTERS}))


class CompleteCheckpoints:
    """Mixin over transformers' Trainer: a checkpoint counts once its manifest, written last, is there.

    Besides transformers' own state it holds the `run.json` of the run that made it, and its counters.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    _resumed_at: int | None = None
    # Called before older checkpoints are removed, which a copy may still be made of
    before_removal: Callable[[], None] = staticmethod(lambda: None)

    def checkpoint_folder(self) -> Path:
        """Where a checkpoint of the current step goes."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of counts and of metrics not yet logged. Collective."""
        raise NotImplementedError

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        raise NotImplementedError

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = self.checkpoint_folder()
        counters = self._counters()
        if self.args.should_save:
            # Not write_json: a metric may be NaN, where the alarm about it only warns
            write_atomic(folder / COUNTERS, json.dumps(counters))
            run = Path(self.args.output_dir) / RUN
            if run.exists():
                write_atomic(folder / RUN, run.read_bytes())
        # Older checkpoints may go only when this one is complete, so Trainer must not rotate by itself
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sort_config(folder)
            card = Path(self.args.output_dir) / CARD  # TRL writes it at a checkpoint, and never again after the last
            if card.exists():
                sync(card)
            write_manifest(folder)
            self._remove_older()

    def renew_card(self) -> None:
        """Write the model's card anew where a checkpoint has brought one: a kill may have torn it."""

    def _remove_older(self) -> None:
        """Remove checkpoints beyond `save_total_limit`, and what is left of those that a kill has cut off."""
        found = checkpoints(self.args.output_dir)
        whole = [path for path in found if is_complete(path)]
        limit = self.args.save_total_limit
        best = Path(self.state.best_model_checkpoint or "").name if self.args.load_best_model_at_end else ""
        old = [path for path in whole[:-limit] if path.name != best] if limit is not None else []
        cut_off = [path for path in found if whole and step_of(path) < step_of(whole[-1]) and _is_cut_off(path)]
        if old or cut_off:
            self.before_removal()
        for path in [*old, *cut_off]:
            discard(path)

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        if resume_from_checkpoint:
            self._restore_counters(json.loads((Path(resume_from_checkpoint) / COUNTERS).read_text()))
            self._resumed_at = steps_done(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **keywords)  # type: ignore[misc]
        if self.args.should_save:  # a run that was killed after its last save has none before which to do so
            self._remove_older()
        return result

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> tuple[list[Any], Any]:
        """The batches of the next step; none where a checkpoint of the last step is gone on from. transformers looks at
        `max_steps` only after a step, and would train one too many."""
        if self._nothing_left():
            return [], None
        return super().get_batch_samples(*arguments, **keywords)  # type: ignore[misc, no-any-return]

    def _maybe_log_save_evaluate(self, *arguments: Any, **keywords: Any) -> None:
        if self._nothing_left():  # the end of the epoch, which may have come before the checkpoint
            self.control.should_save = False
            evaluated = any(
                "eval_loss" in log and log["step"] == self.state.global_step for log in self.state.log_history
            )
            self.control.should_evaluate &= not evaluated
        super()._maybe_log_save_evaluate(*arguments, **keywords)  # type: ignore[misc]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            better: bool = super()._determine_best_metric(metrics=metrics, trial=trial)  # type: ignore[misc]
        except KeyError:
            asked, there = self.args.metric_for_best_model, ", ".join(sorted(metrics))
            raise UserError(f"--metric_for_best_model {asked}: an evaluation has {there}") from None
        return better

    def _nothing_left(self) -> bool:
        steps: int = self.state.global_step
        return steps == self._resumed_at and steps >= self.state.max_steps


class ContinuedLogs:
    """Mixin over a TRL trainer on transformers 5: a resumed run logs what one that was never stopped logs.

    A checkpoint between two logs keeps the sums that the next log is an average of. The card that TRL writes beside a
    checkpoint is no part of it, and is written again before the last save.
    """

    args: Any
    create_model_card: Any

    state: Any
    accelerator: Any
    _metrics: dict[str, Any]
    _total_train_tokens: Any
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _initial_global_step: int
    _resumed_losses: dict[str, Any] | None = None

    def renew_card(self) -> None:
        folder = Path(self.args.output_dir)
        if (folder / CARD).exists():
            self.create_model_card(model_name=folder.name)

    def _counters(self) -> dict[str, Any]:
        losses = {
            "of_rank": gather_object([self._tr_loss.item()]),
            "total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }
        return {"num_tokens": self._total_train_tokens, "metrics": self._metrics["train"], "losses": losses}

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        self._total_train_tokens = counters["num_tokens"]
        self._metrics["train"].update(counters["metrics"])
        self._resumed_losses = counters["losses"]

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> Any:
        # Not earlier: `train` sets them to zero
        if self._resumed_losses is not None:
            losses, self._resumed_losses = self._resumed_losses, None
            of_rank = losses["of_rank"]
            as_many = len(of_rank) == self.accelerator.num_processes
            self._tr_loss += of_rank[self.accelerator.process_index] if as_many else sum(of_rank) / len(of_rank)
            self._total_loss_scalar = losses["total"]
            self._globalstep_last_logged = losses["last_logged"]
        return super()._run_epoch(*arguments, **keywords)  # type: ignore[misc]

    def _finalize_training(self, *arguments: Any, **keywords: Any) -> Any:
        # The sum is over all steps, and transformers divides it by those since the resume, or by a fraction without any
        steps = self.state.global_step - self._initial_global_step
        total = self._total_loss_scalar + self._tr_loss.item()
        self._total_loss_scalar = total * max(steps, _FEWEST_STEPS) / max(self.state.global_step, 1)
        self._tr_loss.zero_()
        return super()._finalize_training(*arguments, **keywords)  # type: ignore[misc]
