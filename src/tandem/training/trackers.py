"""Trackers: each has one record of the run, with the numbers of all ranks, which a resumed run continues."""

import contextlib
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate.utils import gather_object
from transformers.integrations import TensorBoardCallback

from tandem.log import logger
from tandem.monitor.memory import device_name
from tandem.options.training import TrainOptions

TENSORBOARD = "logs/tensorboard"


@contextlib.contextmanager
def joined_trackers(trainer: Any, options: TrainOptions, folder: Path, run_id: str, step: int) -> Iterator[None]:
    """Point the trainer's trackers at this run's own record in each: a new one, or the one it wrote before a kill. The
    record of wandb, which has one a process, ends with the block.

    Collective. Rank 0 alone writes; what it logs names the ranks, and the devices of all are noted at the start.

    Args:
        step: optimizer steps done; TensorBoard hides what was logged after them.
    """
    devices = gather_object([device_name(trainer.accelerator.device)])
    shown = {f"rank_{rank}": name for rank, name in enumerate(devices)}
    if "tensorboard" in options.report_to:
        trainer.remove_callback(TensorBoardCallback)
    if "trackio" in options.report_to and trainer.args.run_name is None:
        trainer.args.run_name = f"{folder.resolve().name}-{run_id[:8]}"  # it identifies a run by its name
    if not trainer.is_world_process_zero():
        yield
        return
    if "tensorboard" in options.report_to:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1 if step else None)
        writer.add_text("devices", "\n\n".join(f"{rank}: {name}" for rank, name in shown.items()), step)
        trainer.add_callback(TensorBoardCallback(writer))
    if "wandb" not in options.report_to:
        yield
        return
    import wandb

    record = wandb.init(
        project=options.wandb_project or os.environ.get("WANDB_PROJECT", "tandem"),
        name=options.run_name,
        id=os.environ.get("WANDB_RUN_ID", run_id),
        resume="allow",
        config={"devices": shown},
        **wandb_place(folder),
    )
    try:
        yield
    except BaseException:
        record.finish(exit_code=1)
        raise
    record.finish()


def wandb_place(folder: Path) -> dict[str, Any]:
    """Arguments of `wandb.init`: it writes into `folder`, and without a key only there, where by itself it would fail
    after the model is loaded."""
    place: dict[str, Any] = {"dir": os.environ.get("WANDB_DIR") or str(folder)}
    if "WANDB_MODE" not in os.environ and not _has_wandb_key():
        place["mode"] = "offline"
        logger.info("no wandb key: the run is written to %s, for `wandb sync`", place["dir"])
    return place


def _has_wandb_key() -> bool:
    """Whether wandb would find a key. Its own functions for that ask its server, or fix its settings before ours."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    server = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return bool({server, "api.wandb.ai"} & known.keys())
