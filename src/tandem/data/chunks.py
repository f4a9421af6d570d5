"""Spreads work on many rows over as many processes as there are cores, in chunks; results come in the rows' order."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from tandem.errors import UserError, first_line
from tandem.ranks import die_with_parent, tell_once

Item = TypeVar("Item")
Made = TypeVar("Made")

CHUNK = 500  # rows that a process works on at a time
FEW = 2_000  # rows up to which more processes take longer to start than to be useful
_AHEAD = 3  # chunks for each process that are submitted ahead of the one whose result is awaited
_PARALLELISM = "TOKENIZERS_PARALLELISM"

_work: Callable[[Sequence[Any]], Any]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[Item, Made]):
    """Processes that do one kind of work on chunks of items.

    They are started before the items are read: forked later, they would hold on to the items in memory.

    Args:
        work: does the work on a chunk.
        processes: how many; 1: this process does the work itself.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Made], processes: int) -> None:
        self._work, self._count = work, processes
        self._pool: ProcessPoolExecutor | None = None
        self._others: set[BaseProcess] = set()

    def __enter__(self) -> "Workers[Item, Made]":
        how = "fork" if sys.platform == "linux" else "spawn"
        if self._count > 1 and (how == "fork" or _can_be_sent(self._work)):
            context = multiprocessing.get_context(how)
            self._others = set(multiprocessing.active_children())
            self._pool = ProcessPoolExecutor(
                self._count, context, initializer=_start, initargs=(self._work, os.getpid())
            )
            with _one_thread_each():
                self._pool.submit(_make, ())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            if kind is not None:  # nobody waits for the chunks that they work on
                for process in set(multiprocessing.active_children()) - self._others:
                    process.kill()
            self._pool.shutdown(cancel_futures=True)

    def map(self, items: Iterable[Item], total: int, label: str) -> Iterator[Made]:
        """Yield `work(chunk)` for each chunk of `items`, in order; items are taken a few chunks ahead.

        Args:
            total: how many items there are; if they are more than a few, there is a progress bar.
            label: of the bar.

        Raises:
            UserError: a process was killed; or what `work` raises.
        """
        iterator = iter(items)
        chunks = iter(lambda: list(islice(iterator, CHUNK)), [])
        with tqdm(total=total, desc=label, unit="row", disable=total <= FEW, leave=False) as bar:
            for each in self._by_one(chunks) if self._pool is None else self._by_several(chunks, self._pool):
                yield each
                bar.update(min(CHUNK, total - bar.n))

    def _by_one(self, chunks: Iterator[Sequence[Item]]) -> Iterator[Made]:
        for chunk in chunks:
            with _one_thread_each():
                made = self._work(chunk)
            yield made

    def _by_several(self, chunks: Iterator[Sequence[Item]], pool: ProcessPoolExecutor) -> Iterator[Made]:
        waiting: deque[Future[Any]] = deque()
        try:
            waiting.extend(pool.submit(_make, chunk) for chunk in islice(chunks, _AHEAD * self._count))
            while waiting:
                made = waiting.popleft().result()
                waiting.extend(pool.submit(_make, chunk) for chunk in islice(chunks, 1))
                yield made
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenizes was killed, perhaps for want of memory: give fewer with --dataset_num_proc"
            ) from error


def _can_be_sent(work: Callable[..., Any]) -> bool:
    try:
        pickle.dumps(work)
    except Exception as error:  # an object's own code may raise anything
        tell_once(f"rows are tokenized by one process: the tokenizer cannot be sent to others ({first_line(error)})")
        return False
    return True


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within the block, tokenizers use one thread, here and in processes that start here, and do not warn of forks."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ.pop(_PARALLELISM)
        if before is not None:
            os.environ[_PARALLELISM] = before


def _start(work: Callable[[Sequence[Any]], Any], parent: int) -> None:
    global _work
    gc.freeze()  # a collection would write to every object of the parent, and so copy all of its pages
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _work = work


def _make(chunk: Sequence[Any]) -> Any:
    return _work(chunk) if chunk else None
