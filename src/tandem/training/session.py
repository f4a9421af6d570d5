"""One training run in its output folder: where it goes on, what it leaves, and when it counts as done."""

import contextlib
import errno
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from tandem.data.formats import Row
from tandem.errors import Preempted, UserError
from tandem.log import LOG_NAME, log_to, logger
from tandem.options.parsing import defaults, resolved, to_yaml
from tandem.options.training import TrainOptions
from tandem.ranks import end_with_launcher
from tandem.runs import (
    LOCK,
    MANIFEST,
    RUN,
    checkpoints,
    damage,
    discard,
    is_complete,
    locked,
    sha256_json,
    step_of,
    write_atomic,
    write_json,
    write_manifest,
)
from tandem.training.trackers import join_trackers
from tandem.training.trainers.callbacks import Mirror, Preemption, RateProgress
from tandem.training.trainers.checkpoints import refuse_code

# Options that change how a run is watched or where it lies, not what it computes: they may differ when it is resumed
_FREE_ON_RESUME = {
    "logging_steps", "report_to", "run_name", "mount_dir", "resume_from_checkpoint", "allow_changed",
    "save_total_limit", "output_dir",
}  # fmt: skip
# These come back from the checkpoint with the optimizer's state, so that another value would change nothing
_KEPT_BY_OPTIMIZER = {"learning_rate", "weight_decay", "optim"}
# What the surroundings of a run, such as Ray, want called as well
ADDED_CALLBACKS: list[TrainerCallback] = []
# Errors of the place that is written to: disk or quota full, mounted read-only, no permission, broken
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_GOING_AWAY = 10.0  # seconds that a killed process may still hold its folder
_NEARLY_FULL = 1 << 20  # bytes left of a disk that a write just failed on


class Session:
    """One training run in its output folder.

    Args:
        options: all of the run's, `train` among them.
        before: the settings of the run that is in the folder, None if there is none.
    """

    def __init__(self, train: TrainOptions, unit: str, options: tuple[Any, ...], before: dict[str, Any] | None) -> None:
        self.options, self.unit, self.config = train, unit, resolved(*options)
        self._defaults = defaults(*options)
        self.folder = Path(train.output_dir)
        self.id = before["id"] if before else uuid.uuid4().hex
        self._before = before
        self._is_main = int(os.environ.get("RANK", "0")) == 0

    def start(self, pairs: list[Row]) -> None:
        """Make `output_dir` this run's own. Called when the inputs are known to be good: bad ones change nothing.

        Args:
            pairs: what is trained on, in its order.

        Raises:
            UserError: a checkpoint named by the user that is not complete, or other pairs than the run's before.
        """
        asked = self.options.resume_from_checkpoint
        before = self._before
        if asked not in ("auto", "no"):
            if not is_complete(asked):
                raise UserError(f"--resume_from_checkpoint {asked}: not a complete checkpoint of Tandem")
            before = _run_in(asked, self._defaults)
        settings = _settings(self.config) | {"data": sha256_json([pair["pair_id"] for pair in pairs])}
        _check_changes(before, settings, self.options)
        if not self._is_main:
            return
        (self.folder / MANIFEST).unlink(missing_ok=True)
        write_atomic(self.folder / "config.yaml", to_yaml(self.config))
        run = {"id": self.id, "config_sha256": sha256_json(self.config), **settings, **_environment()}
        write_json(self.folder / RUN, run)

    def train(self, trainer: Any) -> None:
        """Train, save the model and the metrics, and write the manifest last.

        Raises:
            Preempted: SIGTERM came; a checkpoint of the step it came in is complete.
            UserError: no checkpoint to resume from where the user named one, or the disk is full.
        """
        # One rank looks, and all learn: another might find a checkpoint that this one has just moved away
        resume_from = broadcast_object_list([self._checkpoint() if self._is_main else None])[0]
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RateProgress(self.unit))
        join_trackers(trainer, self.options, self.folder, self.id, _steps_done(resume_from) if resume_from else 0)
        for callback in ADDED_CALLBACKS:
            trainer.add_callback(callback)
        mirror = Mirror(self.options.output_dir, self.options.mount_dir) if self.options.mount_dir else None
        if mirror:
            trainer.add_callback(mirror)
        if resume_from:
            logger.info("resuming from %s", resume_from)
        anomalies = torch.autograd.set_detect_anomaly(True) if self.options.debug else contextlib.nullcontext()
        with anomalies, Preemption(trainer.accelerator) as preemption:
            trainer.add_callback(preemption)
            result = trainer.train(resume_from_checkpoint=resume_from)
        if preemption.came and trainer.state.global_step < trainer.state.max_steps:
            raise Preempted(
                f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on there"
            )
        self._save(trainer, result.metrics)
        if mirror and trainer.is_world_process_zero():
            mirror.copy()
        trainer.end()

    def _checkpoint(self) -> str | None:
        """The checkpoint to go on from. Those that follow it are put aside: this run will make its own.

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
            self._put_aside_after(_steps_done(asked))
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
        try:
            made_by = json.loads((checkpoint / RUN).read_text())["id"]
        except (OSError, ValueError, KeyError, TypeError):
            return "it does not say which run made it"
        return None if made_by == self.id else f"another run made it ({made_by})"

    def _put_aside_after(self, step: int) -> None:
        for path in checkpoints(self.folder):
            if step_of(path) <= step:
                continue
            if not (path / MANIFEST).exists():  # never was one
                discard(path)
                continue
            aside = path.with_name(f"skipped_{path.name}")
            if aside.exists():
                discard(aside)
            path.rename(aside)
            logger.warning("%s was moved to %s", path, aside.name)

    def _save(self, trainer: Any, metrics: dict[str, Any]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")  # TRL's frozen copy of the adapter we started from; not part of the result
        trainer.save_model(str(self.folder))
        if not trainer.is_world_process_zero():
            return
        write_json(self.folder / "training_metrics.json", {"train": metrics, "log_history": trainer.state.log_history})
        write_manifest(self.folder, [file for file in self.folder.iterdir() if file.name not in (LOG_NAME, LOCK)])
        logger.info("model saved in %s", self.folder)


def _steps_done(checkpoint: str) -> int:
    steps: int = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]
    return steps


@contextlib.contextmanager
def open_session(train: TrainOptions, options: tuple[Any, ...], unit: str) -> Iterator[Session | None]:
    """Open `output_dir`; None where an earlier run with the same settings has finished there.

    Raises:
        UserError: the folder holds a run with other settings, which this one would overwrite or resume wrongly; another
            run is going on there; or it cannot be written, at its start or later.
    """
    end_with_launcher()
    folder = Path(train.output_dir)
    before, changed = _found(train, options)
    if is_complete(folder) and before and not changed:
        print(f"{folder}: already trained with these settings", file=sys.stderr)
        yield None
        return
    is_main = int(os.environ.get("RANK", "0")) == 0
    with _storage_errors(folder), locked(folder, _GOING_AWAY) if is_main else contextlib.nullcontext():
        before, changed = _found(train, options)  # the holder before may have written more
        if is_main:
            log_to(folder)
            if changed:
                logger.warning("resuming with changed settings: %s", "; ".join(changed))
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.getLogger("transformers").setLevel(logging.WARNING)
        yield Session(train, unit, options, before)


def _found(train: TrainOptions, options: tuple[Any, ...]) -> tuple[dict[str, Any] | None, list[str]]:
    """The settings of the run in `output_dir` that this one goes on with, None without one; the allowed changes since.

    Raises:
        UserError: it holds a run with other settings.
    """
    folder, config = Path(train.output_dir), resolved(*options)
    before = None if train.resume_from_checkpoint == "no" else _run_in(folder, defaults(*options))
    if is_complete(folder) or checkpoints(folder):
        return before, _check_changes(before, _settings(config), train)
    if before and _changes(before, _settings(config)):
        before = None  # it has left nothing to go on from, and this is another run
    return before, []


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into one line, after removing the checkpoint it cut off: it only takes up the room.

    Raises:
        UserError: for a full disk or quota, a folder that is read-only or forbidden, a disk that fails.
    """
    try:
        yield
    except Exception as error:
        fault = _storage_fault(error, folder)
        if fault is None:
            raise
        kept = "no checkpoint was saved yet"
        with contextlib.suppress(OSError):
            for path in checkpoints(folder):
                if is_complete(path):
                    kept = f"{path.name} is the last good one"
                elif int(os.environ.get("RANK", "0")) == 0:
                    discard(path)
        raise UserError(
            f"--output_dir {folder}: cannot write {fault}; {kept}; put that right, and the same command goes on there"
        ) from error


def _storage_fault(error: BaseException | None, folder: Path) -> str | None:
    """Where and why writing failed, None if `error` is about something else."""
    is_about_writing = False
    while error is not None:
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS and _is_inside(error.filename, folder):
            return f"{error.filename or folder}: {error.strerror}"
        if re.search(r"No space left on device|disk is full|file write failed|unexpected pos", str(error)):
            is_about_writing = True
        error = error.__cause__ or error.__context__
    # torch and safetensors do not say why
    if is_about_writing and shutil.disk_usage(folder).free < _NEARLY_FULL:
        return f"{folder}: {os.strerror(errno.ENOSPC)}"
    return None


def _is_inside(name: Any, folder: Path) -> bool:
    return name is None or Path(os.fsdecode(name)).resolve().is_relative_to(folder.resolve())


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a run's result depends on, as `run.json` has it."""
    return {"config": config, "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def _run_in(folder: str | Path, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """What `run.json` says of the run that has written into `folder`; None where there is none.

    An option that came later than that run is taken at its default, which is what the run did.

    Raises:
        UserError: the file is not one of ours.
    """
    path = Path(folder) / RUN
    try:
        run: dict[str, Any] = json.loads(path.read_text())
        if not run["id"] or not run["config"]:
            return None
        return run | {"config": defaults | run["config"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --output_dir") from error


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings that differ, each with a few words on how; those that cannot change a result are left out.

    Args:
        before: of `run.json`.
        now: the entries of it to compare, `config` among them.
    """
    was = before["config"] | before
    return {
        name: f"{name} was {was.get(name)}, is {value}"
        for name, value in (now["config"] | now).items()
        if name != "config" and name not in _FREE_ON_RESUME and not name.startswith("alarm_") and was.get(name) != value
    }


def _check_changes(before: dict[str, Any] | None, now: dict[str, Any], train: TrainOptions) -> list[str]:
    """The changes since `before` that the user allows, in words.

    Raises:
        UserError: naming every change that is not allowed.
    """
    known = now["config"].keys() | {"processes", "data"}
    unknown = sorted(set(train.allow_changed) - known)
    if unknown:
        raise UserError(f"--allow_changed {' '.join(unknown)}: there is no such setting")
    changed = _changes(before, now) if before else {}
    kept = sorted(_KEPT_BY_OPTIMIZER & changed.keys() & set(train.allow_changed))
    if kept:
        raise UserError(
            f"--allow_changed {' '.join(kept)}: the optimizer's state in a checkpoint brings the old value back; "
            "begin a new run from the model in it"
        )
    refused = [name for name in changed if name not in train.allow_changed]
    if refused:
        raise UserError(
            f"--output_dir {train.output_dir} holds a run with other settings "
            f"({'; '.join(changed[name] for name in refused)}): choose another folder, start over in this one with "
            f"--resume_from_checkpoint no, or go on all the same with --allow_changed {' '.join(refused)}"
        )
    return list(changed.values())


def _commit() -> str | None:
    """The commit that runs; None where this is no checkout, or there is no git (the container images have none)."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tandem")
    return {
        "git_sha": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
