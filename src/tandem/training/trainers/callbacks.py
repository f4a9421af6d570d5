"""Callbacks of a training run: the progress bar, the reaction to SIGTERM, early stopping."""

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tandem.log import logger


class RateProgress(ProgressCallback):
    """transformers' progress bar (with its ETA), and beside it the pairs/s and tokens/s since this process began."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.started, self.first_step = time.perf_counter(), state.global_step
        self.first_tokens: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        seconds = time.perf_counter() - self.started
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rates = {f"{self.unit}/s": f"{(state.global_step - self.first_step) * batch / seconds:.2f}"}
        if "num_tokens" in logs:
            rates["tokens/s"] = f"{logs['num_tokens'] / seconds:.0f}"
        if "loss" in logs:
            rates["loss"] = f"{float(logs['loss']):.4f}"
        self.training_bar.set_postfix(rates)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in logs.items()}
        logger.info("step %d: %s", state.global_step, shown)


class Preemption(TrainerCallback):
    """Ends training with a checkpoint after the step in which SIGTERM came (a spot machine's notice, Slurm's).

    Every rank learns of it at the same step, whichever of them the signal reached. Listens while it is entered.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.came = False  # as all ranks know
        self._noticed = False

    def __enter__(self) -> Self:
        # Ray trains in another thread than the main one, which alone may listen, and has its own way to end workers
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._former)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.came = self._noticed
        if self.accelerator.num_processes > 1:  # a notice that comes during the gather is for the next step
            mine = torch.tensor([self.came], device=self.accelerator.device)
            self.came = bool(self.accelerator.gather(mine).any())
        if self.came:
            control.should_save = control.should_training_stop = True
        return control


class EarlyStop(TrainerCallback):
    """Stops the training after `patience` evaluations of which none was better than the best before them.

    It looks at all that was logged, so that a resumed run stops where one that was never stopped does.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        values = [log[name] for log in state.log_history if name in log]
        if not values:  # of several sets, another is evaluated first
            return
        best = (max if args.greater_is_better else min)(values)
        since = len(values) - 1 - values.index(best)
        if since >= self._patience:
            logger.info("stopped: %d evaluations without a better %s than %.4g", since, name, best)
            control.should_training_stop = True
