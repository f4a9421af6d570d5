"""Records an alarm: a line in a file, and the batches at fault."""

import json
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save as safetensors_bytes

from tandem.monitor.alarms import Alarm
from tandem.monitor.gather import MicroBatch
from tandem.monitor.margins import keep_records
from tandem.runs import append_jsonl, write_atomic

logger = logging.getLogger(__name__)


class AlarmLog:
    """`alarms.jsonl` and `alarms/` of a run's logs folder.

    Args:
        ranks_per_batch: neighbouring ranks that get the same pairs (tensor parallelism).
    """

    def __init__(self, logs_dir: Path, accelerator: Accelerator, ranks_per_batch: int) -> None:
        self.path = logs_dir / "alarms.jsonl"
        self.stopped_by: Alarm | None = None
        """The first alarm that asked for a stop."""
        self._accelerator = accelerator
        self._ranks_per_batch = ranks_per_batch

    def sound(self, alarm: Alarm, step: int, batches: list[str] | None = None) -> None:
        """Warn of an alarm, and write it down; `batches` are the files of its micro-batches."""
        if alarm.action == "stop":
            self.stopped_by = self.stopped_by or alarm
        if self._accelerator.is_main_process:
            logger.warning("Alarm %s (%s) at step %d: %s", alarm.name, alarm.action, step, alarm.message)
            append_jsonl(self.path, alarm.record(step, batches or []))

    def save_batches(self, alarm: Alarm, step: int, micro_batches: list[MicroBatch]) -> list[str]:
        """Write this rank's micro-batches at fault; return the paths of all ranks' relative to the logs folder.

        Collective.
        """
        rank = self._accelerator.process_index
        names = []
        for micro, micro_batch in enumerate(micro_batches):
            if micro_batch.batch is None or (rank // self._ranks_per_batch, micro) not in alarm.sources:
                continue
            inputs = micro_batch.batch().items()
            tensors = {name: x.detach().cpu().contiguous() for name, x in inputs if isinstance(x, torch.Tensor)}
            metadata = {"pair_ids": json.dumps(micro_batch.pair_ids)}
            name = f"alarms/step_{step:05d}_rank_{rank}_micro_{micro}.safetensors"
            write_atomic(self.path.parent / name, safetensors_bytes(tensors, metadata))
            names.append(name)
        return gather_object(names)

    def truncate_after(self, step: int) -> None:
        """Remove the records of later steps, except that of the alarm that stopped the run."""
        keep_records(self.path, lambda r: r["step"] <= step or r["action"] == "stop")
