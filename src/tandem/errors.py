"""The three ways a run ends that are not bugs, and the exit code of each."""

import sys
from collections.abc import Callable
from typing import NoReturn


class TandemExit(Exception):
    """A run that ends on purpose. Its message is one line, and says what to do."""

    exit_code: int


class UserError(TandemExit):
    """Wrong input: the message names the flag, file or row at fault."""

    exit_code = 2


class AlarmStop(TandemExit):
    """A collapse alarm stopped the training; a checkpoint was saved first."""

    exit_code = 3


class Preempted(TandemExit):
    """The machine is going away; the same command resumes from the checkpoint just saved."""

    exit_code = 75


def script_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` and turn a `TandemExit` into one line on stderr and its exit code."""
    try:
        main(sys.argv[1:])
    except TandemExit as stop:
        # One line, whatever a library put into the message
        print(f"{type(stop).__name__}: {' '.join(str(stop).split())}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
