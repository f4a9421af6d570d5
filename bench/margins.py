"""What a long run pays beside its steps: resuming from many recorded ones, and saves that a mirror follows.

    python bench/margins.py [--steps 20000] [--saves 100] [--apart 1] [--old 40aa243]

Two versions, each in a process of its own: the source of the commit `--old` (none with --old ""), and this one.

resume: a run of so many recorded steps is killed, and goes on from its last checkpoint, 1,000 steps before, and from
the middle. The margins are cut back, and read once; in the version of today, thousands beyond 10,000 are packed.

saves: the first process saves so often, five steps and `--apart` seconds from one to the next, and removes the
checkpoint before. A drive stands behind `--mount_dir` on which a file takes 5 ms. What the first process pays is all
that the mirror keeps it for; where a copy takes longer than there is from save to save, it waits for the rest.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
LATENCY = 0.005
STEPS = 5  # from save to save


@contextlib.contextmanager
def no_disk() -> Iterator[None]:
    """Without waiting for the disk, while something is prepared."""
    sync, os.fsync = os.fsync, lambda handle: None
    try:
        yield
    finally:
        os.fsync = sync


def log_step(log: Any, step: int) -> None:
    from tandem.monitor.tail import TailRecord

    pairs, margins = [f"{pair:016x}" for pair in range(32)], np.linspace(-1, 1, 32, dtype=np.float32)
    log.write_step(1, step, pairs, margins, TailRecord(beta=0.1, tau=1.0))


def recorded(folder: Path, steps: int) -> Any:
    """The log of a run of so many steps."""
    from tandem.monitor.margins import MarginsLog

    log = MarginsLog(folder)
    with no_disk():
        for step in range(1, steps + 1):
            log_step(log, step)
        log.flush()
    return log


def resume(steps: int) -> dict[str, float]:
    """Seconds until a run of so many recorded steps has its margins as they were at its checkpoint."""
    from tandem.monitor.margins import MarginsLog

    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "margins"
        recorded(folder, steps)
        found["files"] = float(sum(len(names) for _, _, names in os.walk(folder)))
        for name, step in (("last", steps - 1000), ("middle", steps // 2)):
            started = time.perf_counter()
            MarginsLog(folder).truncate_after(step)
            found[name] = time.perf_counter() - started
    return found


def saves(count: int, steps: int, apart: float) -> dict[str, float]:
    """Milliseconds that a mirror keeps the first process for at each of `count` saves.

    Args:
        steps: of the run before.
        apart: seconds from save to save.
    """
    from tandem.runs import discard, write_json, write_manifest

    try:
        from tandem.training.mirror import Mirror
    except ImportError:
        from tandem.trainers.callbacks import Mirror  # type: ignore[import-not-found, no-redef]
    copy = shutil.copy2
    paid = []
    with tempfile.TemporaryDirectory() as place:
        source, mount = Path(place) / "run", Path(place) / "mount"
        log = recorded(source / "logs" / "margins", steps)
        write_json(source / "run.json", {"id": "x"})
        mirror: Any = Mirror(source, mount)
        with no_disk():
            mirror.copy()
        shutil.copy2 = _slow(copy)
        state: Any = SimpleNamespace(is_world_process_zero=True)
        with mirror.in_background() if hasattr(mirror, "in_background") else tempfile.TemporaryDirectory():
            for number in range(1, count + 1):
                cost = 0.0
                for _ in range(STEPS):
                    time.sleep(apart / STEPS)
                    cost += _seconds(lambda: mirror.on_step_end(None, state, None))
                    steps += 1
                    log_step(log, steps)
                checkpoint = source / f"checkpoint-{number}"
                checkpoint.mkdir()
                for file in range(8):
                    (checkpoint / f"{file}.safetensors").write_bytes(bytes(1 << 20))
                write_json(checkpoint / "run.json", {"id": "x"})
                write_manifest(checkpoint)
                if number > 2:
                    cost += _seconds(getattr(mirror, "join", lambda: None))
                    discard(source / f"checkpoint-{number - 2}")
                cost += _seconds(lambda: mirror.on_save(None, state, None))
                paid.append(1000 * cost)
            log.flush()
        shutil.copy2 = copy
    return {"median": statistics.median(paid), "largest": max(paid)}


def _slow(copy: Any) -> Any:
    def slow(source: Any, target: Any) -> Any:
        time.sleep(LATENCY)
        return copy(source, target)

    return slow


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured(source: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both parts with the version of Tandem in `source`, in a process of its own."""
    own = [sys.executable, __file__, "--measure", "--steps", str(options.steps)]
    own += ["--saves", str(options.saves), "--apart", str(options.apart)]
    done = subprocess.run(
        own, env=os.environ | {"PYTHONPATH": str(source)}, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--saves", type=int, default=100)
    parser.add_argument("--apart", type=float, default=1.0, help="seconds")
    parser.add_argument("--old", default="40aa243")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({"resume": resume(options.steps), "saves": saves(options.saves, 10_000, options.apart)}))
        return
    with tempfile.TemporaryDirectory() as place:
        sources = {"now": ROOT / "src"}
        if options.old:
            archive = subprocess.run(
                ["git", "archive", options.old, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "x", "-C", place], input=archive.stdout, check=True)
            sources = {options.old: Path(place) / "src"} | sources
        print(
            "| version | files of margins | resume, 1,000 steps back | from the middle | save, median | save, largest |"
        )
        print("|---|---|---|---|---|---|")
        for name, source in sources.items():
            found = measured(source, options)
            again, saved = found["resume"], found["saves"]
            print(
                f"| {name} | {again['files']:,.0f} | {again['last']:.2f} s | {again['middle']:.2f} s "
                f"| {saved['median']:.1f} ms | {saved['largest']:.1f} ms |",
                flush=True,
            )


if __name__ == "__main__":
    main()
