"""The three ways a run ends that are not bugs, and the exit code of each."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from tandem.credentials import hide

_LONGEST_LINE = 1000
# What a place can be that a user has named: full, read-only, forbidden, a file where a folder is wanted, or the reverse
_OF_THE_PLACE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
}  # fmt: skip
_A_FILE = "a file stands where a folder is wanted"


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


def one_line(text: str) -> str:
    """`text` as one line of at most 1,000 characters, without keys and passwords.

    Control characters, which a hostile file can get into a message, are shown escaped: they cannot steer the terminal
    or fake further lines.
    """
    line = " ".join(hide(text).split())
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "…"


def first_line(error: BaseException) -> str:
    """The first line of another package's error message, which may be many lines long; the second one too where the
    first only introduces it (`Error(s) in loading state_dict for …:`)."""
    if isinstance(error, KeyError):  # its message is the key alone
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).strip().split("\n") if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def script_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(argv)` and turn a `TandemExit` into one line on stderr and its exit code.

    So is an error of the operating system about a place that cannot be read or written.
    """
    try:
        if sys.platform == "win32":
            raise UserError("Tandem does not run on Windows; use WSL 2 (docs/troubleshooting.md)")
        main(sys.argv[1:])
    except TandemExit as stop:
        _end(stop)
    except OSError as error:
        if (fault := _fault_of_place(error)) is None:
            raise
        _end(UserError(f"{fault}; put that right, or name another place"))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fault_of_place(error: OSError) -> str | None:
    """What is wrong with the place that an error is about; None if it is about none that a user has named."""
    if not isinstance(error.filename, str | bytes):  # a write that failed names none
        return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    if error.errno not in _OF_THE_PLACE:
        return None
    is_file = error.errno in (errno.ENOTDIR, errno.EEXIST)
    return f"{os.fsdecode(error.filename)}: {_A_FILE if is_file else error.strerror}"


def _end(stop: TandemExit) -> NoReturn:
    # The name of one of the three, of which a library's own errors are
    kind = next(cls for cls in type(stop).__mro__ if TandemExit in cls.__bases__)
    print(f"{kind.__name__}: {one_line(str(stop))}", file=sys.stderr)
    sys.exit(stop.exit_code)
