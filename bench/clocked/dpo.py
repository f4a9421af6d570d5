"""scripts/dpo.py with a clock on its steps, which takes turns with another: what `bench/overhead.py` runs."""

import json
import os
import runpy
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tandem.errors import script_main
from tandem.training import session

SCRIPT = Path(__file__).parents[2] / "scripts" / "dpo.py"
FIRST = 10  # steps before the clock starts, in which memory and caches fill
TURN = 5  # steps


class Clock(TrainerCallback):
    """Writes OUTPUT/clock.json: wall-clock and CPU seconds (of this process, all threads) of each turn.

    A second run has its output beside this one's. Past the first steps the two take turns on one core: who ends a
    turn puts a file into the other's folder.
    """

    def __init__(self) -> None:
        self.turns: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        output = Path(args.output_dir)
        since = state.global_step - FIRST
        if since < 0 or since % TURN:
            return
        if since == 0:
            os.sched_setaffinity(0, {int(os.environ["TURNS_CORE"])})  # this thread alone, the one that computes
            (output / "ready").touch()
        else:
            self.turns.append((time.perf_counter() - self.wall, time.process_time() - self.cpu))
            _other(output).joinpath("turn").touch()
        if state.global_step < args.max_steps:
            _await_turn(output)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        (Path(args.output_dir) / "clock.json").write_text(json.dumps(self.turns))


def _other(output: Path) -> Path:
    return next(path.parent for path in output.parent.glob("*/ready") if path.parent.name != output.name)


def _await_turn(output: Path) -> None:
    turn = output / "turn"
    while not turn.exists():
        time.sleep(0.002)
    turn.unlink()


def main(argv: list[str]) -> None:
    session.ADDED_CALLBACKS.append(Clock())
    runpy.run_path(str(SCRIPT))["main"](argv)


if __name__ == "__main__":
    script_main(main)
