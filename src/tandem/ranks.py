"""Several processes of one launch: who writes, who works on what, and how none outlives the launcher.

In evaluation and generation each process has the whole model, and rank r takes every W-th batch.
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tandem.errors import UserError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_LAUNCHER = "TANDEM_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """Whether this process is the first of a launch on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


@functools.cache
def tell_once(line: str) -> None:
    """Say a line on stderr: once, however often its cause comes up, and by one process."""
    if is_first():
        print(one_line(line), file=sys.stderr)


def count() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(task: str) -> None:
    """Refuse a launch of several processes, each of which would do all of the work and write the same files.

    Raises:
        UserError: naming the task.
    """
    if count() > 1:
        raise UserError(f"{task} runs as one process, not {count()}: start it without a launcher")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Bring the processes of a launch together, each on a device of its own.

    Raises:
        UserError: the launch would shard the model, or its processes do not find each other.
    """
    if count() == 1:
        yield
        return
    for variable, engine in _SHARDING.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(
                f"the accelerate config asks for {engine}, but each process holds the whole model here: use "
                "accelerate_configs/ddp.yaml"
            )
    from accelerate import PartialState

    from tandem.devices import has_accelerator

    state = PartialState(cpu=not has_accelerator())
    if state.num_processes != count():
        raise UserError(f"the launcher started {count()} processes, but accelerate sees {state.num_processes}")
    yield
    state.destroy_process_group()


def in_turns(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """`work` of each item, in their order, on every process; each item is worked on by one of them. Collective."""
    if count() == 1:
        yield from map(work, items)
        return
    from accelerate.utils import gather_object

    own = int(os.environ["RANK"])
    for start in range(0, len(items), count()):
        yield from gather_object([work(item) for item in items[start + own : start + own + 1]])


def be_launcher() -> None:
    """Tell the processes that this one starts that it is their launcher."""
    os.environ[_LAUNCHER] = str(os.getpid())


def end_with_launcher() -> None:
    """Kill this process when its launcher dies, so that a resumed run never trains beside an orphan. Linux only.

    The launcher is torchrun's agent or `tandem.launch`; a script that was started by hand is left alone.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(_LAUNCHER) == str(os.getppid())
    if sys.platform != "linux" or not launched:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before that call
        sys.exit(1)
