"""One stage, looked at where each of its calls that change a file comes: a kill there, and the same command again.

    LD_PRELOAD=shim.so python -m tests.crash.forks SCENARIO FOLDER [--every N] [--from K] [--how kept cut zeros]

All libraries are imported once; each command is a fork. The shim (shim.c) stops the first of them before each call and
in the midst of each write. What is there then is tried as it is (`kept`: the process was killed), and as a power cut
leaves it on a journalling file system, which keeps names in their order but not the data of files that no fsync has
followed: the file has its former length (`cut`), or zeros are in the place of the data (`zeros`).
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tandem.errors import TandemExit
from tandem.runs import MANIFEST, damage, read_jsonl, sha256_file, sha256_json
from tests.crash.scenarios import SCENARIOS
from tests.crash.traces import differences, normal

WRITTEN_AT_ONCE = ("run.json", "training_metrics.json", "results.json", "data_report.json", "generation_samples.json")
HOWS = ("kept", "cut", "zeros")


def forked(work: Callable[[], None], screen: Path) -> int:
    """A process that does `work` and prints to `screen`; it ends with the exit code of a script."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for number in (1, 2):
                os.dup2(handle, number)
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
    return child


def in_fork(work: Callable[[], None], screen: Path) -> int:
    """The exit code of `forked`."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work, screen), 0)[1])


class Trial:
    """One scenario in `folder`/work, stopped at each call that changes a file there."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.scenario, self.folder, self.work = name, SCENARIOS[name], folder, folder / "work"
        self._screen, self._counter, self._calls = folder / "screen", folder / "counter", folder / "calls"
        self._arm = ctypes.CDLL(None).crash_arm
        self._arm.argtypes, self._arm.restype = [ctypes.c_char_p] * 3, None
        self._seen: set[str] = set()
        self.tried = self.bad = 0

    def prepare(self) -> None:
        """Make the state before the scenario, and note the one after it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.work.mkdir(parents=True)
        assert in_fork(lambda: self.scenario.prepare(self.work), self._screen) == 0, self._screen.read_text()
        shutil.copytree(self.work, self.folder / "start", symlinks=True)
        assert in_fork(lambda: self.scenario.run(self.work), self._screen) == 0, self._screen.read_text()
        self.straight = normal(self.work)

    def every_call(self, calls: range, hows: Sequence[str], until: float) -> int:
        """Run the scenario, and at each of the `calls` see what a kill there would leave; how many calls there were.

        Every `how` of `HOWS` is tried where it leaves something that was not there before.
        """
        shutil.rmtree(self.work)
        shutil.copytree(self.folder / "start", self.work, symlinks=True)
        child = forked(self._stopping, self.folder / "screen_stopping")
        count = 0
        while os.WIFSTOPPED(status := os.waitpid(child, os.WUNTRACED)[1]):
            count += 1
            if count in calls and time.monotonic() < until:
                lines = self._calls.read_text().splitlines()
                for how in hows:
                    for fault in self._ended(how):
                        print(f"{self.name}, {how}, at {lines[-1]}: {fault}", flush=True)
                self.last = count
            os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(status) == 0, (self.folder / "screen_stopping").read_text()
        return count

    def _stopping(self) -> None:
        self._arm(*map(os.fsencode, (self.work, self._counter, self._calls)))
        self.scenario.run(self.work)

    def _ended(self, how: str) -> list[str]:
        """What is wrong if the process ends here, and the same command is given again."""
        held = self.folder / "held"
        unsynced = [line.split() for line in Path(f"{self._counter}.unsynced").read_text().splitlines()]
        places = {file.lstat().st_ino: file.relative_to(self.work) for file in self.work.rglob("*")}
        self.work.rename(held)
        try:
            shutil.copytree(held, self.work, symlinks=True)
            for inode, safe in unsynced if how != "kept" else ():
                if int(inode) in places:
                    _lose(self.work / places[int(inode)], int(safe), how)
            state = _digest(self.work)
            if state in self._seen:
                return []
            self._seen.add(state)
            self.tried += 1
            faults = halves(self.work, self.scenario.whole_or_absent)
            code = in_fork(lambda: self.scenario.run(self.work), self._screen)
            if code != 0:
                faults.append(f"the same command again: exit code {code}: {self._screen.read_text()[-300:]}")
            else:
                faults += differences(self.straight, normal(self.work))
            self.bad += bool(faults)
            return faults
        finally:
            shutil.rmtree(self.work)
            held.rename(self.work)


def _lose(file: Path, safe: int, how: str) -> None:
    """Take from a file what no fsync has followed: it has its former length, or zeros are there."""
    content = file.read_bytes()
    file.write_bytes(content[:safe] + (bytes(len(content[safe:])) if how == "zeros" else b""))


def _digest(folder: Path) -> str:
    return sha256_json(
        {str(file.relative_to(folder)): sha256_file(file) if file.is_file() else "" for file in folder.rglob("*")}
    )


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
    parser.add_argument("--how", nargs="+", choices=HOWS, default=HOWS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many; the last call is said")
    options = parser.parse_args(argv)
    started = time.monotonic()
    trial = Trial(options.scenario, options.folder)
    trial.scenario.load()
    gc.freeze()  # else each fork copies all of it when it collects
    trial.prepare()
    calls = range(options.first, options.to + 1, options.every)
    count = trial.every_call(calls, options.how, started + options.seconds)
    seconds = time.monotonic() - started
    print(
        f"{options.scenario}: {count} calls, looked at to {trial.last}: "
        f"{trial.tried} states, {trial.bad} with faults, {seconds:.0f} s"
    )
    return 1 if trial.bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
