"""The monitor's state in a checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from tandem.errors import UserError
from tandem.monitor.alarms import AlarmState
from tandem.monitor.interval import Interval
from tandem.monitor.tail import TailState

STATE_OF = "MonitorCallback"  # transformers files a callback's state under the name of its class
_TRAINER_STATE = "trainer_state.json"
_OLDER = "tail_monitor.json"  # a file of its own, until transformers' `ExportableState` took its place


@dataclasses.dataclass(frozen=True)
class MonitorState:
    """A monitor after a step.

    Attributes:
        step: optimizer steps done.
        epoch, epoch_rows: whole epochs begun, and rows that this one has dealt.
        started_with: the options that cannot change any more.
    """

    step: int
    epoch: int
    epoch_rows: int
    started_with: dict[str, float]
    tail: TailState
    alarms: AlarmState
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types."""
        return dataclasses.asdict(self) | {"tail": self.tail.to_dict(), "alarms": self.alarms.to_dict()}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """What a checkpoint's folder keeps.

        Raises:
            UserError: it has no readable state.
        """
        values = saved_state(folder)
        try:
            parts = {
                "tail": TailState.from_dict(values["tail"]),
                "alarms": AlarmState.from_dict(values["alarms"]),
                "interval": Interval(**values["interval"]),
            }
            return cls(**values | parts)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder}: its tail monitor state is damaged ({error})") from error

    def refuse_others(self, started_with: dict[str, float], folder: str | Path) -> None:
        """Refuse a run that would resume from this state, of `folder`, with other options than it was started with.

        Raises:
            UserError: naming one.
        """
        for name, value in started_with.items():
            if self.started_with.get(name) != value:
                raise UserError(
                    f"--{name} {value} differs from the {self.started_with.get(name)} that {folder} was trained with: "
                    "resume with that, or start a new run"
                )


def saved_state(folder: str | Path) -> dict[str, Any]:
    """What `Monitor.exported` gave when the checkpoint `folder` was written.

    Raises:
        UserError: the folder has no readable state.
    """
    folder = Path(folder)
    try:
        if (folder / _OLDER).exists():
            state = json.loads((folder / _OLDER).read_text())
        else:
            state = json.loads((folder / _TRAINER_STATE).read_text())["stateful_callbacks"][STATE_OF]["attributes"]
        if not isinstance(state, dict):
            raise TypeError(f"{type(state).__name__} instead of a mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no tail monitor state to resume from ({error})") from error
    return state
