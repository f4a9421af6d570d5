"""Run a command so that SIGTERM reaches all processes that it has started.

    python -m tandem.launch.supervise [--log FILE] COMMAND…

A shell that waits for a program does not pass SIGTERM on. A pipeline that is told to stop (`docker stop`, systemd,
`kill`) would leave its training running, or have it killed before it saves a checkpoint. With --log FILE, what the
command prints goes to FILE as well as to the screen.
"""

import contextlib
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import BinaryIO

import psutil

from tandem.errors import Preempted

_CHUNK = 1 << 16


class Supervised:
    """A running command, and those of its processes that SIGTERM was passed on to (`asked`)."""

    def __init__(self, command: list[str], log: BinaryIO | None = None) -> None:
        self.asked: list[psutil.Process] = []
        self._log = log
        output = None if log is None else subprocess.PIPE
        signal.signal(signal.SIGTERM, self._pass_on)
        # The terminal sends SIGINT to the command too: whether to end is the command's decision
        signal.signal(signal.SIGINT, lambda number, frame: None)
        self._process = subprocess.Popen(command, stdout=output, stderr=None if log is None else subprocess.STDOUT)

    def wait(self) -> int:
        """Wait until the command and all `asked` have ended. Returns its exit code; 75 where SIGTERM ended it."""
        if self._log is not None:
            self._copy(self._log)
        code = self._process.wait()
        psutil.wait_procs(self.asked)
        if self.asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return Preempted.exit_code
        return code if code >= 0 else 128 - code

    def _copy(self, log: BinaryIO) -> None:
        assert self._process.stdout is not None
        screen = sys.stdout.fileno()
        while chunk := os.read(self._process.stdout.fileno(), _CHUNK):
            log.write(chunk)
            log.flush()
            try:
                os.write(screen, chunk)
            except OSError:  # the screen is closed; the log goes on
                screen = os.open(os.devnull, os.O_WRONLY)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = psutil.Process().children(recursive=True)
        for process in self.asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def main(argv: list[str]) -> int:
    """Run the command of `argv`. Returns its exit code, or 127 where there is no such command."""
    log = None
    if argv[:1] == ["--log"]:
        log = open(argv[1], "ab")  # noqa: SIM115  it stays open as long as this process runs
        argv = argv[2:]
    try:
        return Supervised(argv, log).wait()
    except OSError as error:
        print(f"UserError: {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
