"""One stage, ended in the place of each of its calls that change a file, and repeated.

    LD_PRELOAD=shim.so python -m tests.crash.forks SCENARIO FOLDER [--every N] [--from K] [--losing]

All libraries are imported once; every attempt is a fork, for which the shim (shim.c) is armed.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tandem.errors import TandemExit
from tandem.runs import MANIFEST, damage, read_jsonl
from tests.crash.scenarios import SCENARIOS, Scenario
from tests.crash.traces import differences, normal

WRITTEN_AT_ONCE = ("run.json", "training_metrics.json", "results.json", "data_report.json", "generation_samples.json")
MODES = {"kept": 0, "cut": 1, "zeros": 2}


def in_fork(work: Callable[[], None], screen: Path) -> int:
    """Exit code of `work` in a process of its own, negative for a signal; what it prints goes to `screen`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for number in (1, 2):
                os.dup2(handle, number)
            os.setpgid(0, 0)  # the shim kills the group
            work()
            code = 0
        except TandemExit as stop:
            print(f"{type(stop).__name__}: {stop}", file=sys.stderr)
            code = stop.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Trial:
    """One scenario in `folder`/work, which is made anew from `folder`/start for each attempt."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario, self.folder, self.work = scenario, folder, folder / "work"
        self._screen, self._counter, self._calls = folder / "screen", folder / "counter", folder / "calls"
        self._shim = ctypes.CDLL(None)
        self._shim.crash_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
        self._shim.crash_arm.restype = None

    def prepare(self) -> list[str]:
        """Make the state before the scenario and the one after it; the calls of the scenario that change files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.work.mkdir(parents=True)
        self._must(lambda: self.scenario.prepare(self.work))
        shutil.copytree(self.work, self.folder / "start", symlinks=True)
        self._must(lambda: self._armed(-1, "kept"))
        self.straight = normal(self.work)
        return self._calls.read_text().splitlines()

    def interrupted(self, at: int, how: str) -> list[str]:
        """What is wrong after an end in the place of call `at`, or after the same command again."""
        shutil.rmtree(self.work)
        shutil.copytree(self.folder / "start", self.work, symlinks=True)
        if in_fork(lambda: self._armed(at, how), self._screen) != -9:
            return [f"did not come to call {at}: {self._screen.read_text()[-300:]}"]
        faults = halves(self.work, self.scenario.whole_or_absent)
        code = in_fork(lambda: self.scenario.run(self.work), self._screen)
        if code != 0:
            return [*faults, f"the same command again: exit code {code}: {self._screen.read_text()[-300:]}"]
        return [*faults, *differences(self.straight, normal(self.work))]

    def _armed(self, at: int, how: str) -> None:
        self._counter.unlink(missing_ok=True)
        log = b"" if at >= 0 else os.fsencode(self._calls)
        self._shim.crash_arm(os.fsencode(self.work), os.fsencode(self._counter), at, MODES[how], log)
        self.scenario.run(self.work)

    def _must(self, work: Callable[[], None]) -> None:
        assert in_fork(work, self._screen) == 0, self._screen.read_text()


def halves(folder: Path, whole_or_absent: tuple[str, ...]) -> list[str]:
    """What is there in part: under a name that promises that it is whole."""
    found = []
    for manifest in folder.rglob(MANIFEST):
        if (harm := damage(manifest.parent)) is not None:
            found.append(f"half: {manifest.parent.relative_to(folder)}: {harm}")
    for name in whole_or_absent:
        if (folder / name).exists() and damage(folder / name) is not None:
            found.append(f"half: {name}: {damage(folder / name)}")
    for file in folder.rglob("*.json"):
        # A checkpoint or a model's folder without a manifest is absent, whatever is in it
        if (file.parent / MANIFEST).exists() or file.name in WRITTEN_AT_ONCE:
            try:
                json.loads(file.read_text())
            except ValueError:
                found.append(f"half: {file.relative_to(folder)}")
    for file in folder.rglob("*.jsonl"):
        try:
            read_jsonl(file)
        except ValueError as error:
            found.append(f"half: {file.relative_to(folder)}: {error}")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--from", type=int, default=1, dest="first")
    parser.add_argument("--to", type=int, default=10**9)
    parser.add_argument("--how", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args(argv)
    scenario = SCENARIOS[options.scenario]
    scenario.load()
    gc.freeze()  # else each fork copies all of it when it collects
    trial = Trial(scenario, options.folder)
    calls = trial.prepare()
    started, count, bad = time.monotonic(), 0, 0
    for at in range(options.first, min(len(calls), options.to) + 1, options.every):
        for how in options.how:
            count += 1
            faults = trial.interrupted(at, how)
            bad += bool(faults)
            for fault in faults:
                print(f"{options.scenario}, {how}, call {calls[at - 1]}: {fault}", flush=True)
    seconds = time.monotonic() - started
    print(
        f"{options.scenario}: {len(calls)} calls, ended {count} times, {bad} with faults, {seconds:.0f} s", flush=True
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
