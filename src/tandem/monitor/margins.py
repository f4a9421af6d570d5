"""The margins of every optimizer step on disk: one JSON line a step, and all pairs of the step beside it.

    <folder>/margins_log.jsonl            a record per step, and the event that ended the warm-up
    <folder>/epoch_001/step_00012.npy     structured array: pair_id (str), margin (float32, nats)
    <folder>/steps_10001_11000.npz        beyond 10,000 steps: a thousand such arrays (`packs`)

The array is written first and its record after it, so a record's array is always there. Both are synced to disk, which
takes longer than all else the monitor does in a step; so a thread writes them, and the next step's wait for it. A kill
loses at most the step being written, which a resumed run repeats anyway.
"""

import io
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.monitor import packs
from tandem.monitor.tail import TailRecord
from tandem.runs import append_jsonl, read_jsonl, write_atomic

LOG_NAME = "margins_log.jsonl"


def summary(margins: NDArray[np.floating]) -> dict[str, float | None]:
    """Mean, std (divided by n), min, p10, median, p90, max and share above 0 of `margins` (n,) with n > 0.

    All in nats, but for the share `positive`. Margins that are not finite are left out; if none is finite, the values
    are None.
    """
    finite = np.asarray(margins, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return dict.fromkeys(("mean", "std", "min", "p10", "median", "p90", "max", "positive"))
    p10, median, p90 = np.quantile(finite, (0.1, 0.5, 0.9))
    values = {
        "mean": finite.mean(),
        "std": finite.std(),
        "min": finite.min(),
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": finite.max(),
        "positive": (finite > 0).mean(),
    }
    return {name: float(value) for name, value in values.items()}


def npy_path(epoch: int, step: int) -> str:
    """Where a step's array lies, relative to the margins folder; epochs and steps count from 1."""
    return f"epoch_{epoch:03d}/step_{step:05d}.npy"


class MarginsLog:
    """Writer of one run's margins folder; one process writes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOG_NAME
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._open: Path | None = None  # the pack that the last step will be in

    def flush(self) -> None:
        """Wait until all that was logged is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write_step(
        self, epoch: int, step: int, pair_ids: list[str], margins: NDArray[np.floating], tail: TailRecord
    ) -> dict[str, Any]:
        """Log one optimizer step and return its record; `flush` waits for the disk.

        Args:
            pair_ids: n pairs, each once.
            margins: (n,) their margins in nats.

        Raises:
            OSError: the step before could not be written.
        """
        pairs = np.empty(len(pair_ids), dtype=[("pair_id", np.array(pair_ids).dtype), ("margin", np.float32)])
        pairs["pair_id"], pairs["margin"] = pair_ids, margins
        npy = npy_path(epoch, step)
        record = {
            "epoch": epoch,
            "step": step,
            "n": len(pair_ids),
            **summary(margins),
            "tau": tail.tau,
            "p_hat": tail.p_hat,
            "over": tail.over,
            "beta": tail.beta,
            "npy": npy,
        }
        self.flush()
        self._writing = self._disk.submit(self._write, record, pairs)
        return record

    def _write(self, record: dict[str, Any], pairs: NDArray[Any]) -> None:
        content = io.BytesIO()
        np.save(content, pairs, allow_pickle=False)
        write_atomic(self.folder / record["npy"], content.getvalue())
        append_jsonl(self.path, record)
        self._close_packs(record["step"])

    def _close_packs(self, step: int) -> None:
        """Close the pack of the steps before, where `step` is its last one or the first that is written after it."""
        before, self._open = self._open, packs.pack_of(self.folder, step)
        if before is not None and before != self._open:
            packs.close(before)
        if self._open is not None and packs.last_step(self._open) == step:
            packs.close(self._open)
            self._open = None

    def write_warmup_end(self, epoch: int, step: int, tau0: float, delta: float) -> None:
        """Log the event that the warm-up ended at `step` with the threshold `tau0`, in nats."""
        self.flush()
        event = {"event": "warmup_end", "epoch": epoch, "step": step, "tau0": tau0, "delta": delta}
        append_jsonl(self.path, event)

    def truncate_after(self, step: int) -> None:
        """Forget every step after `step`, so that a run resumed there goes on without a gap or a repeat."""
        self.flush()
        keep_records(self.path, lambda record: record["step"] <= step)
        packs.cut_after(self.folder, step)
        packs.close_until(self.folder, step)
        self._open = packs.pack_of(self.folder, step)


def keep_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON-lines file without the records that `keep` refuses; a missing file stays missing."""
    records = read_jsonl(path)
    kept = [record for record in records if keep(record)]
    if len(kept) < len(records):
        write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def read_margins_log(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step records and events of a margins folder, each in the order written; none if there is no log."""
    records = read_jsonl(Path(folder) / LOG_NAME)
    return [r for r in records if "event" not in r], [r for r in records if "event" in r]


def read_margins(path: str | Path) -> NDArray[Any]:
    """A step's structured array (n,) with the fields `pair_id` (str) and `margin` (float32, nats).

    Args:
        path: of its file, `<folder>/epoch_001/step_00012.npy`; where that is in a pack by now, it is read from there.

    Raises:
        FileNotFoundError: it is in neither.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        packed = packs.read(Path(path))
        if packed is None:
            raise
        content = packed
    array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array
