"""One training run in its output folder: where it goes on, what it leaves, and when it counts as done."""

import contextlib
import json
import logging
import netrc
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from transformers import ProgressCallback
from transformers.trainer_callback import PrinterCallback

from tandem.config import resolved, to_yaml
from tandem.errors import Preempted, UserError
from tandem.log import log_to, logger
from tandem.options import TrainOptions
from tandem.runs import MANIFEST, is_complete, sha256_json, write_atomic, write_json
from tandem.trainers.callbacks import Mirror, Preemption, RateProgress

# Options that change how a run is watched, not what it computes: they may differ when it is resumed
_FREE_ON_RESUME = {"logging_steps", "report_to", "run_name", "mount_dir", "resume_from_checkpoint", "save_total_limit"}


class Session:
    """One training run in its output folder."""

    def __init__(self, train: TrainOptions, unit: str, config: dict[str, Any]) -> None:
        self.options, self.unit, self.config = train, unit, config
        self.folder = Path(train.output_dir)
        self.resume_from: str | None = None

    def start(self) -> None:
        """Make `output_dir` this run's own. Called when the inputs are known to be good: bad ones change nothing.

        Raises:
            UserError: a checkpoint named by the user that is not complete.
        """
        self.resume_from = self.checkpoint()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        if int(os.environ.get("RANK", "0")) > 0:
            return
        if self.options.resume_from_checkpoint == "no":  # else a later run could take them for its own
            for checkpoint in self.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        write_atomic(self.folder / "config.yaml", to_yaml(self.config))
        run = {"config": self.config, "config_sha256": sha256_json(self.config), **_environment()}
        write_json(self.folder / "run.json", run)
        if "wandb" in self.options.report_to:
            _prepare_wandb(self.folder)

    def checkpoint(self) -> str | None:
        """The checkpoint to go on from.

        Raises:
            UserError: one named by the user that is not complete.
        """
        asked = self.options.resume_from_checkpoint
        if asked == "no":
            return None
        if asked != "auto":
            if not is_complete(asked):
                raise UserError(f"--resume_from_checkpoint {asked}: not a complete checkpoint of Tandem")
            return asked
        found = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
        for path in found:
            if is_complete(path):
                return str(path)
            logger.warning("%s is torn (no manifest, or a file is missing): using the one before it", path)
        return None

    def train(self, trainer: Any) -> None:
        """Train, save the model and the metrics, and write the manifest last.

        Raises:
            Preempted: SIGTERM came; a checkpoint of the step it came in is complete.
        """
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RateProgress(self.unit))
        mirror = Mirror(self.options.output_dir, self.options.mount_dir) if self.options.mount_dir else None
        if mirror:
            trainer.add_callback(mirror)
        if self.resume_from:
            logger.info("resuming from %s", self.resume_from)
        anomalies = torch.autograd.set_detect_anomaly(True) if self.options.debug else contextlib.nullcontext()
        with anomalies, Preemption(trainer.accelerator) as preemption:
            trainer.add_callback(preemption)
            result = trainer.train(resume_from_checkpoint=self.resume_from)
        if preemption.came and trainer.state.global_step < trainer.state.max_steps:
            raise Preempted(
                f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on there"
            )
        self._save(trainer, result.metrics)
        if mirror and trainer.is_world_process_zero():
            mirror.copy()
        trainer.end()

    def _save(self, trainer: Any, metrics: dict[str, Any]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")  # TRL's frozen copy of the adapter we started from; not part of the result
        trainer.save_model(str(self.folder))
        if not trainer.is_world_process_zero():
            return
        write_json(self.folder / "training_metrics.json", {"train": metrics, "log_history": trainer.state.log_history})
        write_json(self.folder / MANIFEST, {"files": _sizes(self.folder)})
        logger.info("model saved in %s", self.folder)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if _is_result(file)}


def _is_result(file: Path) -> bool:
    return file.is_file() and file.name not in (MANIFEST, "train.log")


@contextlib.contextmanager
def open_session(train: TrainOptions, options: tuple[Any, ...], unit: str) -> Iterator[Session | None]:
    """Open `output_dir`; None where an earlier run with the same settings has finished there.

    Raises:
        UserError: the folder holds a run with other settings, which this one would overwrite or resume wrongly.
    """
    config = resolved(*options)
    folder = Path(train.output_dir)
    if train.resume_from_checkpoint != "no":
        _check_same_run(folder, config)
        if is_complete(folder):
            print(f"{folder}: already trained with these settings", file=sys.stderr)
            yield None
            return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made: {error.strerror}") from error
    if int(os.environ.get("RANK", "0")) == 0:
        log_to(folder)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.WARNING)
    yield Session(train, unit, config)


def _prepare_wandb(folder: Path) -> None:
    """Have wandb write into `folder`, and without a key only there: it would refuse, after the model is loaded."""
    os.environ.setdefault("WANDB_DIR", str(folder))
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        logger.info("no wandb key: the run is written to %s, for `wandb sync`", os.environ["WANDB_DIR"])


def _has_wandb_key() -> bool:
    """Whether wandb would find a key; its own ways to ask go to its server, or fix its settings before ours."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return bool({server, "api.wandb.ai"} & known.keys())


def _check_same_run(folder: Path, config: dict[str, Any]) -> None:
    started = is_complete(folder) or any(is_complete(path) for path in folder.glob("checkpoint-*"))
    if not started or not (folder / "run.json").exists():
        return
    before = json.loads((folder / "run.json").read_text())["config"]
    changed = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in config.items()
        if name not in _FREE_ON_RESUME and not name.startswith("alarm_") and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"--output_dir {folder} holds a run with other settings ({'; '.join(changed)}): choose another folder, "
            "or start over in this one with --resume_from_checkpoint no"
        )


def _environment() -> dict[str, Any]:
    packages = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tandem")
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "git_sha": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
