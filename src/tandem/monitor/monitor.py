"""The monitor as the trainer sees it: fed per micro-batch, read per optimizer step.

    trainer                              here
    compute_loss, training mode     ->   Monitor.add             keeps device tensors, waits for nothing
    _get_grad_norm                  ->   Monitor.add_grad_norm   the same
    on_pre_optimizer_step           ->   Monitor.collect         the step's one gather; stops on what is not finite
    on_step_end                     ->   Monitor.end_step        tail state, logs, β of the next step
    log, training mode              ->   Monitor.interval_logs   tail/* and system/*; the alarms about logs
    _save_checkpoint                ->   Monitor.before_save     stops where the weights are not finite
    TrainerState, written           ->   Monitor.exported        with transformers' own state, by `MonitorCallback`
    train, resumed                  ->   Monitor.load

Every rank computes the same state from the same gathered array, so τ and β are equal on all ranks without a
broadcast; rank 0 alone writes the logs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from tandem.errors import AlarmStop
from tandem.monitor import gather, memory
from tandem.monitor.alarm_log import AlarmLog
from tandem.monitor.alarms import Alarm, AlarmState, check_finite, check_grad_norm, check_log, check_stuck
from tandem.monitor.interval import Interval
from tandem.monitor.margins import MarginsLog
from tandem.monitor.options import MonitorOptions
from tandem.monitor.saved import MonitorState
from tandem.monitor.tail import TailState, update

_PLAIN = gather.Sampling()


class Monitor:
    """Margins, tail, alarms and memory of one training run.

    Args:
        options: checked options.
        logs_dir: the run's logs folder; margins go to `margins/`, alarms to `alarms.jsonl` and `alarms/`.
        accelerator: the trainer's.
        beta: β of the first step.
        save_checkpoint: saves a checkpoint of the weights as they are, on all ranks, and calls `before_save` for it.
        sampling: how pairs are dealt.

    Raises:
        UserError: `beta` is outside of the control's range.
    """

    def __init__(
        self,
        options: MonitorOptions,
        logs_dir: str | Path,
        accelerator: Accelerator,
        beta: float,
        *,
        save_checkpoint: Callable[[], None],
        sampling: gather.Sampling = _PLAIN,
    ) -> None:
        options.check_beta(beta)
        self.options = options
        self.config = options.tail_config()
        self.step = 0  # the last optimizer step that ended
        self.state = TailState(beta=beta)
        self._margins_log = MarginsLog(Path(logs_dir) / "margins")
        self.alarms = AlarmLog(Path(logs_dir), accelerator, sampling.ranks_per_batch)
        self._accelerator, self._save_checkpoint = accelerator, save_checkpoint
        self._sampling = sampling
        self._first_beta = beta
        self._saved_step: int | None = None
        self._epoch, self._epoch_rows = 0, 0
        self._alarm_state = AlarmState()
        self._interval = Interval()
        self._reward_margin: float | None = None  # of the last log
        self._record: dict[str, Any] | None = None
        self._usage = memory.RankUsage()
        self._micro_batches: list[gather.MicroBatch] = []
        self._grad_norm: float | torch.Tensor | None = None
        self._collected: tuple[gather.Step, gather.Share, float | None] | None = None

    @property
    def beta(self) -> float:
        """β for the next loss."""
        return self.state.beta

    def add(self, micro_batch: gather.MicroBatch) -> None:
        """Take one micro-batch of pairs in training. Does not wait for the device."""
        self._micro_batches.append(micro_batch)

    def join(self, count: int, order: Sequence[int], batch: Callable[[], Mapping[str, Any]]) -> None:
        """Join the last `count` micro-batches, which were parts of one; see `MicroBatch.joined`."""
        self._micro_batches[-count:] = [gather.MicroBatch.joined(self._micro_batches[-count:], order, batch)]

    def add_grad_norm(self, grad_norm: float | torch.Tensor | None) -> None:
        """Take the gradient norm before clipping. Does not wait for the device; collective if it is a DTensor."""
        self._grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm

    def collect(self, epoch: int) -> None:
        """Bring the step's pairs together and look for what is not finite. Collective; twice in a step is once.

        Must come before the weights move: under DeepSpeed, whose backward also steps, before the last backward.

        Args:
            epoch: whole epochs done before this step.

        Raises:
            AlarmStop: something is not finite and `--alarm_nonfinite` is stop. The optimizer has not stepped, the
                batch is saved, and so is a checkpoint of the weights before this step, unless there is one.
        """
        if self._collected is not None:
            return
        share = gather.to_host(self._micro_batches, self._grad_norm)
        shares = gather.gather_shares(share)[:: self._sampling.ranks_per_batch]
        dealt = gather.assemble(shares)
        grad_norm = gather.grad_norm_of(shares)
        scaled = self._accelerator.scaler is not None
        alarm = check_finite(
            dealt, [s.losses for s in shares], None if scaled else grad_norm, self.options.alarm_nonfinite
        )
        if alarm is not None:
            batches = self.alarms.save_batches(alarm, self.step + 1, self._micro_batches)
            self._sound(alarm, batches, step=self.step + 1)
            if alarm.action == "stop":
                self._stop_before_step(alarm)
        if epoch != self._epoch:
            self._epoch, self._epoch_rows = epoch, 0
        step = self._sampling.step(dealt, epoch, self._epoch_rows)
        self._epoch_rows += dealt.n_rows
        self._collected = step, share, grad_norm
        self._micro_batches, self._grad_norm = [], None

    def end_step(self, epoch: int) -> None:
        """The optimizer has stepped: move the tail state, write the logs, set the next β."""
        self.collect(epoch)
        assert self._collected is not None
        step, share, grad_norm = self._collected
        self._collected = None
        self.step += 1
        self._usage.throughput.step(sum(map(len, share.pair_ids)), share.tokens)
        if step.finite.any():
            self._move_tail(step)
        if spike := check_grad_norm(self._alarm_state, grad_norm, self.options):
            self._sound(spike)

    def _move_tail(self, step: gather.Step) -> None:
        margins, chosen, _, kl = step.values[:, step.finite].astype(np.float64)
        self.state, tail = update(self.state, margins, self.config)
        if self._accelerator.is_main_process:
            self._record = self._margins_log.write_step(self._epoch + 1, self.step, step.pair_ids, step.margins, tail)
            if tail.warmup_ended and tail.tau is not None:
                self._margins_log.write_warmup_end(self._epoch + 1, self.step, tail.tau, self.config.delta)
        self._interval.add(margins, chosen, kl)
        if tail.warmup_ended:
            self._interval.tau0 = tail.tau

    def interval_logs(self) -> dict[str, float]:
        """What the trackers get: `tail/*` of the latest step and `system/rank_k/*` since the log before. Collective.

        Checks the alarms about logs, so it must be called once per training log, on all ranks. Empty on other ranks
        than 0, and if no step ended since the call before.
        """
        interval, self._interval = self._interval, Interval()
        if not interval.pairs:
            return {}
        usage = self._usage.gather(self._accelerator, self.step)
        alarms = check_log(self._alarm_state, interval.mean_chosen, interval.accuracy, interval.mean_kl, self.options)
        if interval.mean_kl is not None:  # there is a reference
            self._reward_margin = self.beta * interval.mean_margin
            alarms += [alarm for alarm in [self._stuck()] if alarm is not None]
        for alarm in alarms:
            self._sound(alarm)
        if not self._accelerator.is_main_process:
            return {}
        values = {"failures": self.state.failures, "tau0": interval.tau0} | (self._record or {})
        return tail_logs(values) | usage

    def _stuck(self, *, at_end: bool = False) -> Alarm | None:
        if self._reward_margin is None:
            return None
        return check_stuck(self._alarm_state, self._reward_margin, self.step, self.options, at_end=at_end)

    def _sound(self, alarm: Alarm, batches: list[str] | None = None, *, step: int | None = None) -> None:
        self._margins_log.flush()
        self.alarms.sound(alarm, self.step if step is None else step, batches)

    def _stop_before_step(self, alarm: Alarm) -> None:
        if self.step == 0:
            kept = "no step was taken, so there is nothing to save"
        elif self._saved_step == self.step:
            kept = f"the checkpoint of step {self.step} is good"
        else:
            try:
                self._save_checkpoint()
                kept = f"saved a checkpoint of step {self.step}"
            except AlarmStop:
                kept = "the weights are not finite any more, so no checkpoint was saved: the last one is good"
        raise AlarmStop(f"stopped in step {self.step + 1}: {alarm.message}; {kept}; see {self.alarms.path}")

    def stop(self) -> None:
        """Finish the logs, and end a training that an alarm has stopped after its step.

        Raises:
            AlarmStop: if one did.
        """
        if self.alarms.stopped_by is None and (stuck := self._stuck(at_end=True)):
            self._sound(dataclasses.replace(stuck, action="warn"))  # there is nothing left to stop
        self._margins_log.flush()
        alarm = self.alarms.stopped_by
        if alarm is not None:
            kept = f"saved a checkpoint of step {self.step}" if self._saved_step == self.step else "saved no checkpoint"
            raise AlarmStop(f"stopped after step {self.step}: {alarm.message}; {kept}; see {self.alarms.path}")

    def before_save(self, model: torch.nn.Module) -> None:
        """A checkpoint of the step is about to be written. Collective.

        Raises:
            AlarmStop: trainable weights are not finite and `--alarm_nonfinite` is stop; nothing was written, so that
                no checkpoint, and no rotation of older ones, follows.
        """
        alarm = check_weights(model, self.options.alarm_nonfinite)
        if alarm is not None:
            self._sound(alarm)
            if alarm.action == "stop":
                raise AlarmStop(f"stopped after step {self.step}: {alarm.message}; no checkpoint was saved of them")
        if self._accelerator.is_main_process:
            self._margins_log.flush()
        self._saved_step = self.step

    def exported(self) -> dict[str, Any]:
        """The state as JSON's types, the same on all ranks."""
        return MonitorState(
            step=self.step,
            epoch=self._epoch,
            epoch_rows=self._epoch_rows,
            started_with=self._started_with(),
            tail=self.state,
            alarms=self._alarm_state,
            interval=self._interval,
        ).to_dict()

    def _started_with(self) -> dict[str, float]:
        """The options that have already shaped the state, and so cannot change any more."""
        config = self.config
        return {"beta": self._first_beta, "tail_delta": config.delta, "tail_warmup_steps": config.warmup_steps}

    def load(self, folder: str | Path) -> None:
        """Resume from the state in a checkpoint's folder; on all ranks, before training.

        Raises:
            UserError: the folder has no readable state, or it was made with options that cannot change any more.
        """
        saved = MonitorState.read(folder)
        saved.refuse_others(self._started_with(), folder)
        self.state, self._alarm_state, self._interval = saved.tail, saved.alarms, saved.interval
        self.step, self._epoch, self._epoch_rows = saved.step, saved.epoch, saved.epoch_rows
        self._saved_step = self.step

    def begin(self, global_step: int) -> None:
        """Training begins after `global_step` steps: forget what was logged beyond them.

        Raises:
            RuntimeError: the state is of another step.
        """
        if global_step != self.step:
            raise RuntimeError(f"training begins at step {global_step}, the monitor's state is of step {self.step}")
        memory.write_devices(self.alarms.path.with_name("devices.json"), self._accelerator)
        if self._accelerator.is_main_process:
            self._margins_log.truncate_after(global_step)
            self.alarms.truncate_after(global_step)
        self.resume_clock()

    def resume_clock(self) -> None:
        """Leave the time since the last step's end out of the throughput."""
        self._usage.throughput.resume()


def tail_logs(record: Mapping[str, float | None]) -> dict[str, float]:
    """The entries of a step's record for the trackers: `tail/*`."""
    names = record.keys() - {"epoch", "step", "npy"}
    return {f"tail/{name}": float(value) for name in sorted(names) if (value := record[name]) is not None}


def check_weights(model: torch.nn.Module, action: str) -> Alarm | None:
    """The alarm for trainable weights that are not finite on some rank. Collective."""
    if all(gather_object([weights_are_finite(model)])):
        return None
    return Alarm("nonfinite", action, math.nan, "trainable weights are not finite")


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Whether this rank's trainable weights are all finite; of a sharded parameter it looks at its own shard."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            shard = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3 leaves the parameter itself empty
            local = shard.to_local() if isinstance(shard, DTensor) else shard
            if not torch.isfinite(local).all():
                return False
    return True
