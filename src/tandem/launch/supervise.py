"""Run a command so that SIGTERM reaches all that it has started.

    python -m tandem.launch.supervise [--log FILE] COMMAND…

A shell that waits for a program does not pass SIGTERM on, so a pipeline that is told to stop (`docker stop`, systemd,
`kill`) would leave its training running, or have it killed without a checkpoint. With --log FILE what the command
prints goes to FILE as well as to the screen.
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
    """A command that was started, and the processes that were asked to end with it."""

    def __init__(self, command: list[str], log: BinaryIO | None = None) -> None:
        self.asked: list[psutil.Process] = []
        self._log = log
        output = None if log is None else subprocess.PIPE
        signal.signal(signal.SIGTERM, self._pass_on)
        # The terminal sends SIGINT to the command as well, which says what becomes of it
        signal.signal(signal.SIGINT, lambda number, frame: None)
        self._process = subprocess.Popen(command, stdout=output, stderr=None if log is None else subprocess.STDOUT)

    def wait(self) -> int:
        """The command's exit code once it and all that were asked have ended; 75 where SIGTERM ended it."""
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
            except OSError:  # nobody reads the screen any more; the log goes on
                screen = os.open(os.devnull, os.O_WRONLY)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = psutil.Process().children(recursive=True)
        for process in self.asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def main(argv: list[str]) -> int:
    """Run the command of `argv`; its exit code, 127 where there is no such command."""
    log = None
    if argv[:1] == ["--log"]:
        log = open(argv[1], "ab")  # noqa: SIM115  as long as this process
        argv = argv[2:]
    try:
        return Supervised(argv, log).wait()
    except OSError as error:
        print(f"UserError: {argv[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
