"""The monitor's place in a training loop of transformers."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tandem.monitor.monitor import Monitor
from tandem.monitor.saved import STATE_OF


class MonitorCallback(TrainerCallback, ExportableState):
    """Ties a trainer's `monitor` to its training loop, and the monitor's β to the trainer's `beta`.

    Add it after the trainer's own callbacks, which is where `add_callback` puts it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._monitor: Monitor = trainer.monitor

    def state(self) -> dict[str, Any]:
        """What transformers writes into trainer_state.json with every checkpoint; `Monitor.load` reads it."""
        return {"args": {}, "attributes": self._monitor.exported()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.stateful_callbacks.setdefault(STATE_OF, {})  # a checkpoint of an older Tandem's has no such place
        self._monitor.begin(state.global_step)
        self._trainer.beta = self._monitor.beta

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._monitor.collect(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # The step that ends an epoch has moved state.epoch to the next whole number already
        self._monitor.end_step(math.ceil(state.epoch or 1) - 1)
        self._trainer.beta = self._monitor.beta
        return self._stop_if_asked(control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> TrainerControl:
        if self._monitor.alarms.stopped_by is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._monitor.resume_clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._monitor.resume_clock()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._monitor.stop()
