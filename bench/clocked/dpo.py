"""scripts/dpo.py with a clock on its steps: what `bench/overhead.py` has each launcher run."""

import json
import runpy
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tandem import session
from tandem.errors import script_main

SCRIPT = Path(__file__).parents[2] / "scripts" / "dpo.py"


class Clock(TrainerCallback):
    """Writes OUTPUT/clock.json: wall-clock and CPU seconds (of this process, all threads) at the end of each step."""

    def __init__(self) -> None:
        self.read: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.read.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        (Path(args.output_dir) / "clock.json").write_text(json.dumps(self.read))


def main(argv: list[str]) -> None:
    session.ADDED_CALLBACKS.append(Clock())
    runpy.run_path(str(SCRIPT))["main"](argv)


if __name__ == "__main__":
    script_main(main)
