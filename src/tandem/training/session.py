"""One training run in its output folder: from where it resumes, what it leaves, and when it counts as done."""

import contextlib
import json
import logging
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback

from tandem.errors import Preempted, UserError
from tandem.log import logger, logging_to
from tandem.models.adapters import sort_config
from tandem.models.companions import carry
from tandem.options.model import is_adapter
from tandem.options.parsing import resolved
from tandem.options.training import TrainOptions
from tandem.options.yaml_text import to_yaml
from tandem.ranks import count, end_with_launcher, forget_told, is_first
from tandem.runs import (
    CARD,
    CONFIG,
    MANIFEST,
    RUN,
    checkpoints,
    damage,
    discard,
    fault,
    is_complete,
    locked,
    model_files,
    put_aside_after,
    run_id,
    sha256_json,
    step_of,
    sync,
    write_atomic,
    write_json,
    write_manifest,
)
from tandem.training.mirror import Mirror
from tandem.training.settings import (
    changes,
    check_changes,
    contents_of,
    day_of,
    environment,
    run_in,
    settings_of,
    usual,
)  # fmt: skip
from tandem.training.storage import storage_errors
from tandem.training.trackers import joined_trackers
from tandem.training.trainers.callbacks import EarlyStop, Preemption, RateProgress
from tandem.training.trainers.checkpoints import refuse_code, steps_done

_ADDED_CALLBACKS: ContextVar[tuple[TrainerCallback, ...]] = ContextVar("added callbacks", default=())
_TEMPORARY_OF_SAFETENSORS = ".tmp" + "[0-9A-Za-z]" * 6
GOING_AWAY = 10.0  # seconds for which a killed process may still hold its folder


@contextlib.contextmanager
def added_callbacks(*callbacks: TrainerCallback) -> Iterator[None]:
    """Within the block, runs also call `callbacks`: the program around them (Ray) follows their progress by these."""
    token = _ADDED_CALLBACKS.set(callbacks)
    try:
        yield
    finally:
        _ADDED_CALLBACKS.reset(token)


class Session:
    """One training run in its output folder.

    Attributes:
        own: holds what the run has set for its whole process and its end undoes.
        processes: the result of `Builders.start_processes`, which must exist while models are loaded.

    Args:
        options: all of the run's, `train` among them.
        before: the settings of the run that is in the folder, None if there is none.
        mirror: on rank 0, if the run has one.
    """

    def __init__(
        self,
        train: TrainOptions,
        unit: str,
        options: tuple[Any, ...],
        before: dict[str, Any] | None,
        mirror: Mirror | None,
        own: contextlib.ExitStack,
    ) -> None:
        self.own = own
        self.processes: object = None
        self.options, self.unit, self.config = train, unit, resolved(*options)
        self._usual = usual(*options)
        self.folder = Path(train.output_dir)
        self.id = before["id"] if before else uuid.uuid4().hex
        self._before, self._mirror = before, mirror
        named = train.resume_from_checkpoint not in ("auto", "no")
        self.day = day_of(run_in(train.resume_from_checkpoint, self._usual) if named else before)

    def start(self, pairs: str, tokens: str) -> None:
        """Make `output_dir` this run's own. Called when the inputs are known to be good: bad ones change nothing.

        Args:
            pairs: a hash of what is trained on, in its order.
            tokens: a hash of what is tokenized of it, and of what is evaluated.

        Raises:
            UserError: a checkpoint named by the user that is not complete, or other pairs than the run's before.
        """
        asked = self.options.resume_from_checkpoint
        before = self._before
        if asked not in ("auto", "no"):
            if not is_complete(asked):
                raise UserError(f"--resume_from_checkpoint {asked}: not a complete checkpoint of Tandem")
            before = run_in(asked, self._usual)
        settings = settings_of(self.config, self._usual, before) | {"data": pairs, "tokens": tokens}
        settings |= contents_of(self.config)
        check_changes(before, settings, self.options)
        if not is_first():
            return
        replaced = _ids(self.folder) - {self.id}
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_atomic(self.folder / CONFIG, to_yaml(self.config))
        run = {"id": self.id, "replaced": sorted(replaced), "config_sha256": sha256_json(self.config)}
        write_json(self.folder / RUN, run | settings | {"day": self.day} | environment())
        if self._mirror:
            self._mirror.claim()

    def train(self, trainer: Any) -> None:
        """Train, save the model and the metrics, and write the manifest last.

        Raises:
            Preempted: SIGTERM came; a checkpoint of the step it came in is complete.
            UserError: no checkpoint to resume from where the user named one, or the disk is full.
        """
        # One rank looks and tells the others, which might find a checkpoint that this one has just moved away
        resume_from = broadcast_object_list([self._checkpoint() if is_first() else None])[0]
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RateProgress(self.unit))
        steps = steps_done(resume_from) if resume_from else 0
        self.own.enter_context(joined_trackers(trainer, self.options, self.folder, self.id, steps))
        if self.options.early_stopping_patience:
            trainer.add_callback(EarlyStop(self.options.early_stopping_patience))
        for callback in _ADDED_CALLBACKS.get():
            trainer.add_callback(callback)
        mirroring = self._mirror.in_background() if self._mirror else contextlib.nullcontext()
        if self._mirror:
            trainer.add_callback(self._mirror)
            trainer.checkpoints.before_removal = self._mirror.join
        if resume_from:
            logger.info("resuming from %s", resume_from)
        anomalies = torch.autograd.set_detect_anomaly(True) if self.options.debug else contextlib.nullcontext()
        with anomalies, mirroring, Preemption(trainer.accelerator) as preemption:
            trainer.add_callback(preemption)
            result = trainer.train(resume_from_checkpoint=resume_from)
        if preemption.came and trainer.state.global_step < trainer.state.max_steps:
            raise Preempted(
                f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on there"
            )
        self._save(trainer, result.metrics)
        if self._mirror:
            self._mirror.copy()
        trainer.end()

    def _checkpoint(self) -> str | None:
        """The checkpoint to resume from. Checkpoints of later steps are put aside: this run will make its own.

        Raises:
            UserError: one named by the user that is damaged, or one that hides code.
        """
        asked = self.options.resume_from_checkpoint
        if asked == "no":  # else a later run could take them for its own
            for path in checkpoints(self.folder):
                discard(path)
            return None
        if asked != "auto":
            reason = damage(asked)
            if reason is not None:
                raise UserError(f"--resume_from_checkpoint {asked} cannot be used: {reason}")
            refuse_code(asked)
            self._put_aside_after(steps_done(asked))
            return asked
        found = None
        for path in reversed(checkpoints(self.folder)):
            reason = damage(path) or self._foreign(path)
            if reason is None:
                refuse_code(path)
                found = path
                break
            logger.warning("%s is skipped: %s", path, reason)
        if found is None and checkpoints(self.folder):
            logger.warning("%s has no other checkpoint: starting over", self.folder)
        self._put_aside_after(step_of(found) if found else 0)
        return str(found) if found else None

    def _foreign(self, checkpoint: Path) -> str | None:
        made_by = run_id(checkpoint)
        if made_by is None:
            return "it does not say which run made it"
        return None if made_by == self.id else f"another run made it ({made_by})"

    def _put_aside_after(self, step: int) -> None:
        put_aside_after(step, checkpoints(self.folder))
        if self._mirror:
            self._mirror.put_aside_after(step)

    def _save(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if is_first():
            for leftover in self.folder.glob(_TEMPORARY_OF_SAFETENSORS):  # of a save that a kill cut off
                leftover.unlink()
        trainer.renew_card()
        trainer.save_model(str(self.folder))
        if not trainer.is_world_process_zero():
            return
        sort_config(self.folder)
        if not is_adapter(str(self.folder)):  # an adapter gets them when it is merged
            carry(self.config["model_name_or_path"], self.config["model_revision"], self.folder)
        write_json(self.folder / "training_metrics.json", {"train": metrics, "log_history": trainer.state.log_history})
        for name in (CARD, TRAINING_ARGS_NAME):  # not part of the model, but a crash should not lose them either
            if (self.folder / name).exists():
                sync(self.folder / name)
        write_manifest(self.folder, [*model_files(self.folder), self.folder / RUN])
        logger.info("model saved in %s", self.folder)


@contextlib.contextmanager
def open_session(train: TrainOptions, options: tuple[Any, ...], unit: str) -> Iterator[Session | None]:
    """Open `output_dir`; None if an earlier run with the same settings has finished there, or in its mirror.

    Raises:
        UserError: the folder or its mirror holds a run with other settings, which this one would overwrite or resume
            wrongly; another process is training there; or it cannot be written, at its start or later.
    """
    end_with_launcher()
    folder = Path(train.output_dir)
    mirror = Mirror(folder, Path(train.mount_dir)) if train.mount_dir and is_first() else None
    before, changed = _found(train, options, mirror)
    if is_complete(folder) and before and not changed:
        if mirror and not mirror.is_up_to_date():  # it was cut off in its last copy
            with locked(folder, GOING_AWAY):
                mirror.copy()
        print(f"{folder}: already trained with these settings", file=sys.stderr)
        yield None
        return
    with contextlib.ExitStack() as own:
        own.enter_context(storage_errors(folder))
        if is_first():
            own.enter_context(locked(folder, GOING_AWAY))
        before, changed = _found(train, options, mirror)  # the holder before may have written more
        restored = mirror is not None and train.resume_from_checkpoint != "no" and mirror.holds_more()
        if mirror and restored:
            # Several processes have no way yet to tell each other that nothing is left to do: they find no step left
            mirror.bring_back(whole=count() == 1 and not changed)
        if is_complete(folder) and before and not changed:
            if count() > 1:  # the other processes may have looked too early to see it
                raise UserError(f"--output_dir {folder}: another process has just finished this run")
            print(f"{folder}: already trained with these settings", file=sys.stderr)
            yield None
            return
        if is_first():
            own.enter_context(logging_to(folder))
            if mirror and restored:
                logger.info("%s was brought back from its mirror %s", folder, mirror.folder)
            if changed:
                logger.warning("resuming with changed settings: %s", "; ".join(changed))
        own.enter_context(_quiet_libraries())
        own.callback(forget_told)  # a later run in this process tells everything again
        yield Session(train, unit, options, before, mirror, own)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    libraries = logging.getLogger("transformers")
    level = libraries.level
    libraries.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        libraries.setLevel(level)


def _found(
    train: TrainOptions, options: tuple[Any, ...], mirror: Mirror | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings of the run in `output_dir` or its mirror that is resumed (None: there is none), and the allowed
    changes since then.

    Raises:
        UserError: there is a run with other settings, or a finished model that would be trained over.
    """
    folder, known = Path(train.output_dir), usual(*options)
    settings = settings_of(resolved(*options), known)
    asked = train.resume_from_checkpoint
    if mirror:
        own = _ids(folder) or ({run_id(asked) or ""} if asked not in ("auto", "no") else set())
        mirror.refuse_foreign(own, start_over=asked != "auto")
    if asked == "no":
        return None, []
    before = run_in(folder, known)
    if before is None and mirror and run_id(mirror.folder):
        before = run_in(mirror.folder, known)
        return before, check_changes(before, settings, train, f"--mount_dir: {mirror.folder} is the mirror of")
    if is_complete(folder) or checkpoints(folder) or (mirror and mirror.holds_more()):
        changed = check_changes(before, settings, train)
    elif before and changes(before, settings):
        before, changed = None, []  # that run has left nothing to resume from, so this is a new one
    else:
        changed = []
    _refuse_to_train_over(folder, before, changed)
    return before, changed


def _refuse_to_train_over(folder: Path, before: dict[str, Any] | None, changed: list[str]) -> None:
    if not (folder / MANIFEST).exists():
        return
    reason = fault(folder)
    if reason is None and before is None:
        reason = "it does not say which run made it"
    if reason is None and changed and not any(is_complete(path) for path in checkpoints(folder)):
        reason = "it has no checkpoint to go on from with other settings"
    if reason is not None:
        raise UserError(
            f"--output_dir {folder} holds a finished model, but {reason}: put that right, choose another folder, or "
            "train over it with --resume_from_checkpoint no"
        )


def _ids(folder: Path) -> set[str]:
    """The ids of the run in `folder` and of those that it has replaced."""
    try:
        run = json.loads((folder / RUN).read_text())
        return {run["id"], *run.get("replaced", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
