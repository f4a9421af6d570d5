"""Where a checkpoint keeps the monitor's state."""

import json
from pathlib import Path
from typing import Any

from tandem.errors import UserError

STATE_OF = "MonitorCallback"  # transformers files a callback's state under the name of its class
_TRAINER_STATE = "trainer_state.json"
_OLDER = "tail_monitor.json"  # a file of its own, until transformers' `ExportableState` took its place


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
