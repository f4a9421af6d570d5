"""Ranks that feed a monitor made-up margins; started by torchrun with an output folder, or called in one process.

Pairs are dealt by accelerate's own sampler shard, so padding and its order are the real ones. A pair's margin depends
on the pair and the step alone, whichever rank has it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from tandem.errors import AlarmStop
from tandem.monitor.gather import MicroBatch, Sampling
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions

GLOBAL_MICRO_BATCH = 4
ACCUMULATION = 2
CASES: dict[str, dict[str, Any]] = {
    "full": {"pairs": 24},
    "padded": {"pairs": 21},  # the last batch is filled with pairs of the epoch's beginning
    "tiny": {"pairs": 3},  # padded with itself
    "repeated": {"pairs": 24, "ids": 20},  # four rows are copies of others
    "uneven": {"pairs": 21, "even": False},  # rank 0 gets a last micro-batch of one pair, rank 1 none
    "resumed": {"pairs": 21, "resume_after": 5},  # a new monitor goes on in the second epoch, before its padding
}


def margin(pair: str, step: int) -> float:
    return math.sin(1.7 * int(pair[1:]) + 0.3 * step) * (1 + 0.2 * step)


def run(
    folder: Path,
    accelerator: Accelerator,
    pairs: int,
    ids: int | None = None,
    even: bool = True,
    resume_after: int | None = None,
) -> None:
    """Two epochs; each rank writes its state after every step."""
    options = MonitorOptions(tail_warmup_steps=2, beta_control="risk", tail_delta=0.3)

    def new_monitor() -> Monitor:
        return Monitor(options, folder, accelerator, 0.1, save_checkpoint=lambda: None, sampling=Sampling(pairs))

    monitor = new_monitor()
    monitor.begin(0)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = BatchSampler(range(pairs), GLOBAL_MICRO_BATCH // world, drop_last=False)
    states = []
    for epoch in (0, 1):
        dealt = list(BatchSamplerShard(batches, world, rank, even_batches=even))
        micro_batches = math.ceil(pairs / GLOBAL_MICRO_BATCH)
        for first in range(0, micro_batches, ACCUMULATION):
            for rows in dealt[first : first + ACCUMULATION]:
                feed(monitor, [f"p{row % (ids or pairs)}" for row in rows])
            monitor.add_grad_norm(torch.tensor(1.0))
            monitor.collect(epoch)
            monitor.end_step(epoch)
            states.append(monitor.state.to_dict())
            if monitor.step == resume_after:
                monitor.before_save(torch.nn.Linear(1, 1))
                state = {"stateful_callbacks": {"MonitorCallback": {"attributes": monitor.exported()}}}
                if accelerator.is_main_process:
                    (folder / "trainer_state.json").write_text(json.dumps(state))
                accelerator.wait_for_everyone()
                monitor = new_monitor()
                monitor.load(folder)
                monitor.begin(resume_after)
    logs = monitor.interval_logs()
    monitor.stop()
    (folder / f"rank_{rank}.json").write_text(json.dumps({"states": states, "logs": logs}))


def feed(monitor: Monitor, pair_ids: list[str], bad: bool = False) -> None:
    margins = torch.tensor([margin(pair, monitor.step) for pair in pair_ids], dtype=torch.float32)
    if bad:
        margins[0] = math.nan
    batch = {"input_ids": torch.arange(len(pair_ids))}
    logps = margins - 10, -margins - 10
    monitor.add(MicroBatch.of(pair_ids, margins, logps, margins.mean(), tokens=7, batch=lambda: batch))


def stop(folder: Path, accelerator: Accelerator) -> None:
    """Only rank 1 sees a NaN; all ranks must stop."""
    saved = []
    monitor = Monitor(MonitorOptions(), folder, accelerator, 0.1, save_checkpoint=lambda: saved.append(monitor.step))
    monitor.begin(0)
    feed(monitor, [f"a{accelerator.process_index}"])
    monitor.end_step(0)
    feed(monitor, [f"b{accelerator.process_index}"], bad=accelerator.process_index == 1)
    try:
        monitor.collect(0)
    except AlarmStop as alarm:
        (folder / f"rank_{accelerator.process_index}.json").write_text(json.dumps([str(alarm), saved]))


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name, case in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        run(folder / name, accelerator, **case)
    (folder / "stop").mkdir(exist_ok=True)
    stop(folder / "stop", accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
