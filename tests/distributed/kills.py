"""SIGKILL at a chosen moment of a training run: any rank, their launcher, or all that was started."""

import os
import random
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.distributed.ranks import ranks_of, start

TARGETS = ("rank 0", "rank 1", "launcher", "everything")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `target` in the `nth` moment of its kind since the command was started."""

    stage: str
    moment: str
    """step, evaluation, save or reference."""
    target: str
    nth: int = 1


class Run:
    """One command, repeated until it is done.

    Args:
        folder: holds a stage's output folder by its name.
        cache: of reference log-probs.
    """

    def __init__(self, command: Sequence[str], folder: Path, cache: Path, seed: int) -> None:
        self.command, self.folder, self.cache = command, folder, cache
        self.random = random.Random(seed)

    def finish(self) -> str:
        """Run to the end; what was on screen."""
        process = start(self.command)
        screen, _ = process.communicate(timeout=300)
        assert process.returncode == 0, screen
        return screen

    def killed(self, kill: Kill) -> bool:
        """Run until the moment has come, and kill; whether it was hit. All processes are gone afterwards."""
        out = self.folder / kill.stage
        log = out / "train.log"
        before = log.stat().st_size if log.exists() else 0

        def written() -> str:
            return log.read_text()[before:] if log.exists() else ""

        process = start(self.command)
        come, still = self._watch(kill, out, written)
        while not come():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        if kill.moment in ("step", "evaluation"):
            time.sleep(self.random.uniform(0, 0.05))
        hit = still()
        self._kill(process, kill.target)
        process.communicate(timeout=150)
        assert process.returncode != 0
        return hit

    def _watch(
        self, kill: Kill, out: Path, written: Callable[[], str]
    ) -> tuple[Callable[[], bool], Callable[[], bool]]:
        """Whether the moment has come, and whether it is still there."""

        def steps() -> list[str]:
            return re.findall(r"step (\d+): \{'loss'", written())

        def evaluations() -> int:
            return len(re.findall(r"step \d+: \{'eval_loss'", written()))

        def evaluating() -> bool:
            return sum(int(step) % 5 == 0 for step in steps()) >= evaluations() + 1 and evaluations() == kill.nth - 1

        seen: set[str] = set()

        def saving() -> bool:
            torn = [path.name for path in out.glob("checkpoint-*") if not (path / "manifest.json").exists()]
            started = "reference of" in written() or bool(steps())  # else it is what an earlier kill left
            seen.update(torn if started else ())
            return bool(torn) and len(seen) >= kill.nth

        def scored() -> int:
            try:
                with closing(sqlite3.connect(f"file:{self.cache}/log_probs.sqlite?mode=ro", uri=True)) as database:
                    return int(database.execute("SELECT count(*) FROM pairs").fetchone()[0])
            except sqlite3.Error:
                return 0

        first = scored()
        match kill.moment:
            case "step":
                return lambda: len(steps()) >= kill.nth, lambda: True
            case "evaluation":
                return evaluating, evaluating
            case "save":
                return saving, saving
            case _:
                return lambda: scored() >= first + 4 * kill.nth, lambda: not steps()

    def _kill(self, process: "subprocess.Popen[str]", target: str) -> None:
        ranks = ranks_of(process.pid)
        started = psutil.Process(process.pid).children(recursive=True)
        if target == "everything":
            os.killpg(process.pid, signal.SIGKILL)
        elif target == "launcher":
            ranks[0].parent().kill()
        else:
            ranks[int(target.removeprefix("rank "))].kill()
        _, alive = psutil.wait_procs(started, timeout=150)
        assert not alive
