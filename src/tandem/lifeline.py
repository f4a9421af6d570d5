"""Processes that do not outlive their launcher, which they would train on beside when the same command resumes."""

import ctypes
import os
import signal
import sys

_LAUNCHER = "TANDEM_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def be_launcher() -> None:
    """Tell the processes that this one starts that it is their launcher."""
    os.environ[_LAUNCHER] = str(os.getpid())


def end_with_launcher() -> None:
    """Have the kernel kill this process as soon as its launcher is dead, by whatever signal. Linux only.

    The launcher is torchrun's agent or `tandem.launch`; a script that was started by hand is left alone.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(_LAUNCHER) == str(os.getppid())
    if sys.platform != "linux" or not launched:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before that call
        sys.exit(1)
