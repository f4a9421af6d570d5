"""Checkpoints that are complete or absent, and that hold everything a resumed run needs."""

import contextlib
import json
from collections.abc import Callable, Iterator
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

# The files that transformers reads with torch.load; training_args.bin it only writes
_PICKLES = ("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model_fsdp*.bin")

_FEWEST_STEPS = 0.001  # by this transformers divides a loss where no step was made


def refuse_code(checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose pickles hold anything but tensors and plain values, before any of them is used.

    Each is read with torch's restricted unpickler, as transformers will do, but without the tensors' content.

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
    """Whether a kill has left this checkpoint of Tandem's without a manifest, half written or half removed."""
    names = {file.name for file in checkpoint.iterdir()}
    return MANIFEST not in names and (not names or bool(names & {RUN, COUNTERS}))


def _is_evaluation(metric: str) -> bool:
    """Whether a log's entry is the loss on held-out data, of the only set or of one of several."""
    return metric.startswith("eval_") and metric.endswith("_loss")


class CheckpointState:
    """The checkpoints of a trainer, each of which counts once its manifest, written last, is there.

    Besides transformers' own state a checkpoint holds the `run.json` of the run that made it, and its counters: what
    the trainer counts, and metrics not yet logged.

    Attributes:
        before_removal: called before older checkpoints are removed: the mirror may still be copying them.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._resumed_at: int | None = None
        self.before_removal: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def completed(self, counters: dict[str, Any]) -> Iterator[None]:
        """What transformers saves within the block becomes a complete checkpoint of the current step. Collective."""
        args = self._trainer.args
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self._trainer.state.global_step}"
        if args.should_save:
            # Not write_json: a metric may be NaN, where the alarm about it only warns
            write_atomic(folder / COUNTERS, json.dumps(counters))
            run = Path(args.output_dir) / RUN
            if run.exists():
                write_atomic(folder / RUN, run.read_bytes())
            self._trainer.save_beside(folder)
        # Older checkpoints may go only when this one is complete, so Trainer must not rotate by itself
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            yield
        finally:
            args.save_total_limit = limit
        self._trainer.accelerator.wait_for_everyone()
        if args.should_save:
            sort_config(folder)
            card = Path(args.output_dir) / CARD  # TRL writes it at a checkpoint, and never again after the last
            if card.exists():
                sync(card)
            write_manifest(folder)
            self.remove_older()

    def resume(self, checkpoint: str) -> dict[str, Any]:
        """Note that the run resumes from `checkpoint`; returns the checkpoint's counters."""
        counters: dict[str, Any] = json.loads((Path(checkpoint) / COUNTERS).read_text())
        self._resumed_at = steps_done(checkpoint)
        return counters

    def remove_older(self) -> None:
        """Remove checkpoints beyond `save_total_limit`, and what kills have left of others."""
        args = self._trainer.args
        found = checkpoints(args.output_dir)
        whole = [path for path in found if is_complete(path)]
        limit = args.save_total_limit
        best = Path(self._trainer.state.best_model_checkpoint or "").name if args.load_best_model_at_end else ""
        old = [path for path in whole[:-limit] if path.name != best] if limit is not None else []
        cut_off = [path for path in found if whole and step_of(path) < step_of(whole[-1]) and _is_cut_off(path)]
        if old or cut_off:
            self.before_removal()
        for path in [*old, *cut_off]:
            discard(path)

    def nothing_left(self) -> bool:
        """Whether the run resumed from a checkpoint of the last step, so that there is no step to make."""
        steps: int = self._trainer.state.global_step
        return steps == self._resumed_at and steps >= self._trainer.state.max_steps

    def end_again(self) -> None:
        """For the end of an epoch that ended before the checkpoint was saved: keep it from being saved or evaluated
        again."""
        state, control = self._trainer.state, self._trainer.control
        control.should_save = False
        steps = [log["step"] for log in state.log_history if any(map(_is_evaluation, log))]
        control.should_evaluate &= state.global_step not in steps


class LossSums:
    """The sums of which a TRL trainer on transformers 5 logs averages. Checkpoints keep them, so that a resumed run
    logs the same numbers as one that was never stopped."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._resumed: dict[str, Any] | None = None

    def counters(self) -> dict[str, Any]:
        """What a checkpoint between two logs keeps of them. Collective."""
        trainer = self._trainer
        losses = {
            "of_rank": gather_object([trainer._tr_loss.item()]),
            "total": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
        }
        return {"num_tokens": trainer._total_train_tokens, "metrics": trainer._metrics["train"], "losses": losses}

    def restore(self, counters: dict[str, Any]) -> None:
        """Take what `counters` kept; that of the losses by `bring_back`, since `train` sets them to zero."""
        self._trainer._total_train_tokens = counters["num_tokens"]
        self._trainer._metrics["train"].update(counters["metrics"])
        self._resumed = counters["losses"]

    def bring_back(self) -> None:
        """Called before an epoch: restore the sums of the checkpoint, once."""
        if self._resumed is None:
            return
        losses, self._resumed = self._resumed, None
        trainer, of_rank = self._trainer, losses["of_rank"]
        as_many = len(of_rank) == trainer.accelerator.num_processes
        trainer._tr_loss += of_rank[trainer.accelerator.process_index] if as_many else sum(of_rank) / len(of_rank)
        trainer._total_loss_scalar = losses["total"]
        trainer._globalstep_last_logged = losses["last_logged"]

    def finish(self) -> None:
        """Called before the last log, for which transformers divides the sum over all steps by the number of steps
        since the resume (by a fraction if there were none): scale the sum, so that the mean over all steps results."""
        trainer = self._trainer
        steps = trainer.state.global_step - trainer._initial_global_step
        total = trainer._total_loss_scalar + trainer._tr_loss.item()
        trainer._total_loss_scalar = total * max(steps, _FEWEST_STEPS) / max(trainer.state.global_step, 1)
        trainer._tr_loss.zero_()
