"""Turns write errors of a full, read-only or broken disk into one line, and removes the checkpoint that was cut off."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.errors import TandemExit, UserError
from tandem.ranks import is_first
from tandem.runs import checkpoints, discard, is_complete

# Disk or quota full, mounted read-only, no permission, broken
_OF_THE_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# torch's writer, safetensors, SQLite and TensorBoard raise no errno; these are their words for a failed write
_SAID = ("No space left on device", "disk is full", "file write failed", "unexpected pos")
_NEARLY_FULL = 1 << 20  # a disk with fewer bytes than this left counts as full


@contextlib.contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Within the block, a failed write becomes one line, and the checkpoint that it cut off is removed to free space.

    Raises:
        UserError: for a full disk or quota, a folder that is read-only or forbidden, a disk that fails.
    """
    try:
        yield
    except TandemExit:
        raise
    except Exception as error:
        fault = storage_fault(error, folder)
        if fault is None:
            raise
        kept = "no checkpoint was saved yet"
        with contextlib.suppress(OSError):
            for path in checkpoints(folder):
                if is_complete(path):
                    kept = f"{path.name} is the last good one"
                elif is_first():
                    discard(path)
        raise UserError(
            f"--output_dir {folder}: cannot write {fault}; {kept}; put that right, and the same command goes on there"
        ) from error


def storage_fault(error: BaseException | None, folder: Path) -> str | None:
    """Where and why writing into `folder` failed; None if neither `error` nor its causes are about writing."""
    is_about_writing = False
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OF_THE_PLACE and _is_inside(error.filename, folder):
            return f"{error.filename or folder}: {error.strerror}"
        is_about_writing |= any(words in str(error) for words in _SAID)
        error = error.__cause__ or error.__context__
    if is_about_writing and shutil.disk_usage(folder).free < _NEARLY_FULL:
        return f"{folder}: {os.strerror(errno.ENOSPC)}"
    return None


def _is_inside(name: Any, folder: Path) -> bool:
    return name is None or Path(os.fsdecode(name)).resolve().is_relative_to(folder.resolve())
