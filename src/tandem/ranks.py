"""Several processes of one launch: which one writes, which works on what, and how none outlives the launcher.

In evaluation and generation rank r of W takes every W-th batch, from the r-th on. Each process has the whole model, or,
where the launch asks for FSDP, a shard of it, and gathers one layer at a time.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

from tandem.errors import UserError, one_line
from tandem.log import logger

Item = TypeVar("Item")
Result = TypeVar("Result")

_LAUNCHER = "TANDEM_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
FIRST_PROCESS = Path("/proc/1/cmdline")
_LAUNCHERS = re.compile(rb"accelerate|torchrun|torch\.distributed|tandem\.launch")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """Whether this process is the first of a launch on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


Said = tuple[str, str]
"""The name of a function, `tell`, `tell_once` or `warn`, and the line that it was called with."""

_recorded: ContextVar[list[Said] | None] = ContextVar("what is said", default=None)
_told: set[str] = set()


def tell(line: str) -> None:
    """Print a line on stderr, from the first process only."""
    if not _is_recorded("tell", line) and is_first():
        print(one_line(line), file=sys.stderr)


def tell_once(line: str) -> None:
    """Print a line on stderr from the first process, and only once, however often its cause comes up."""
    if not _is_recorded("tell_once", line) and line not in _told:
        _told.add(line)
        tell(line)


def warn(line: str) -> None:
    """Log a warning; within `recorded`, it is kept like lines of `tell`."""
    if not _is_recorded("warn", line):
        logger.warning("%s", line)


def forget_told() -> None:
    """Have `tell_once` print everything anew, for another run in the same process."""
    _told.clear()


@contextlib.contextmanager
def recorded() -> Iterator[list[Said]]:
    """Within the block, lines are not printed but kept, in order, for `say_again`."""
    lines: list[Said] = []
    token = _recorded.set(lines)
    try:
        yield lines
    finally:
        _recorded.reset(token)


def say_again(lines: Sequence[Said]) -> None:
    """Print or log recorded lines, each as it would have been."""
    for how, line in lines:
        {"tell": tell, "tell_once": tell_once, "warn": warn}[how](line)


def _is_recorded(how: str, line: str) -> bool:
    lines = _recorded.get()
    if lines is None:
        return False
    lines.append((how, line))
    return True


def count(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher has started."""
    return int(environment.get("WORLD_SIZE", "1"))


def count_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many of the launch's processes are on this machine."""
    return int(environment.get("LOCAL_WORLD_SIZE", "1"))


def machines() -> int:
    """How many machines the launch's processes are on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def has_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as one of a group, which may be a group of one."""
    return "LOCAL_RANK" in environment


def leave_group() -> None:
    """Have this process count as one that no launcher has started, from here on."""
    del os.environ["LOCAL_RANK"]


@contextlib.contextmanager
def as_if(processes: int) -> Iterator[None]:
    """Within the block, `count()` is `processes`."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def refuse_several(task: str) -> None:
    """Refuse a launch of several processes, each of which would do all of the work and write the same files.

    Raises:
        UserError: naming the task.
    """
    if count() > 1:
        raise UserError(f"{task} runs as one process, not {count()}: start it without a launcher")


def is_sharded() -> bool:
    """Whether the launch asks for models sharded over its processes (FSDP)."""
    return count() > 1 and _is_on("ACCELERATE_USE_FSDP")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Bring the processes of a launch together, each on a device of its own.

    Raises:
        UserError: the launch would shard the model otherwise than by FSDP 2, or its processes do not find each other.
    """
    if count() == 1:
        yield
        return
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "the accelerate config asks for DeepSpeed, which trains only: use accelerate_configs/fsdp.yaml for a model "
            "larger than a device, else ddp.yaml"
        )
    if is_sharded() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the accelerate config asks for FSDP version 1: use accelerate_configs/fsdp.yaml")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process reads its own shards
    from accelerate import PartialState

    from tandem.devices import has_accelerator

    state = PartialState(cpu=not has_accelerator())
    if state.num_processes != count():
        raise UserError(f"the launcher started {count()} processes, but accelerate sees {state.num_processes}")
    yield
    state.destroy_process_group()


def in_turns(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield `work(item)` of all items, in order, on every process; each is computed by one of them. Collective.

    With a sharded model every process takes part in every forward, since each layer is gathered from all of them: a
    process that has no item left works on another's, and the result is dropped.
    """
    if count() == 1:
        yield from map(work, items)
        return
    from accelerate.utils import gather_object

    own = int(os.environ["RANK"])
    for start in range(0, len(items), count()):
        mine = items[start + own : start + own + 1]
        if is_sharded() and not mine:
            work(items[start])
        yield from gather_object([work(item) for item in mine])


def be_launcher() -> None:
    """Mark this process as the launcher of the processes that it starts."""
    os.environ[_LAUNCHER] = str(os.getpid())


def end_with_launcher() -> None:
    """Kill this process when its launcher dies, so that a resumed run never trains beside an orphan. Linux only.

    The launcher is torchrun's agent or `tandem.launch`; a script that was started by hand is left alone.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(_LAUNCHER) == str(os.getppid())
    if launched:
        die_with_parent()


def die_with_parent(parent: int | None = None) -> None:
    """Kill this process when the one that started it dies. Linux only.

    Args:
        parent: id of the process that started it, if known.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the parent died before that call, process 1 has adopted this one. In a container that may be the launcher
    is_orphan = os.getppid() == 1 and not _LAUNCHERS.search(FIRST_PROCESS.read_bytes())
    if is_orphan if parent is None else os.getppid() != parent:
        sys.exit(1)
