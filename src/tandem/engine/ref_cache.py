"""Reference log-probs on disk, keyed by what they depend on and by nothing else.

A pair's entry is keyed by the reference's weights and configuration, its adapter's too, the token ids of both rows as
they are forwarded (after truncation) and which of them are scored, the dtype of the forward, and `ld_alpha`. So a sweep
over β, learning rate, loss, epochs, order or subset scores each pair once ever, and a change of template, tokenizer,
truncation, adapter or of one weight finds nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tandem.errors import UserError
from tandem.ranks import is_first

Ids = Sequence[int] | NDArray[np.int32]
DEFAULT_CACHE = Path("~/.cache/tandem/reference")
_DATABASE = "log_probs.sqlite"
# How long to wait for another run's insert, which holds the write lock
_LOCK_SECONDS = 60
COMMIT_SECONDS = 2.0
# Longer than the resolution of any file system's times: two writes within it can leave one date
_SETTLED_SECONDS = 60.0
STARTED = time.time()


def fingerprint(model: PreTrainedModel, *, adapter: bool = True) -> str:
    """Hex digest of all that the log-probs of the reference `model` come from: weights and configuration, its
    adapter's too.

    The same in one piece as sharded. Collective where it is sharded.

    Args:
        adapter: whether a PEFT model is the reference with its active adapters on. Without, it has the fingerprint of
            its base.
    """
    settings, tensors = _parts(model, adapter)
    digest = xxhash.xxh3_128()
    for each in settings:
        digest.update(each)
    for name, tensor in tensors:
        whole = _whole(tensor)
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Source:
    """What a model's weights were read from.

    Attributes:
        files: none where the weights are not those of files alone.
        dtype: the type that they were read as.
    """

    files: Sequence[Path] = ()
    dtype: str = "auto"


def source_key(model: PreTrainedModel, source: Source, *, adapter: bool = True) -> bytes | None:
    """Key of a model's fingerprint, made from the files that its weights were read from without reading them: their
    device, inode, size and times of change.

    Args:
        adapter: as in `fingerprint`.

    Returns:
        None where the files do not say what the weights are: there are none, or one was changed after this process
        began or shortly before, so that what was read may differ from what the file holds.
    """
    marks = []
    for file in source.files:
        found = file.stat()
        if max(found.st_mtime, found.st_ctime) > STARTED - _SETTLED_SECONDS:
            return None
        marks.append([file.name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
    if not marks:
        return None
    settings, tensors = _parts(model, adapter)
    shapes = [f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors]
    read = [marks, source.dtype, transformers.__version__]
    text = json.dumps([read, [each.decode() for each in settings], shapes])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _parts(model: PreTrainedModel, adapter: bool) -> tuple[list[bytes], list[tuple[str, torch.Tensor]]]:
    """The settings of `fingerprint`, and its tensors by name and in order."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures", "pad_token_id"):
        config.pop(name, None)
    settings = [json.dumps(config, sort_keys=True, default=str).encode()]
    known = getattr(model, "peft_config", {})
    active = _active_adapters(model) if adapter else []
    for name in sorted(active):
        settings.append(json.dumps(_adapter_settings(known[name]), sort_keys=True, default=_plain).encode())
    return settings, sorted(_reference_tensors(model, off=set(known) - set(active)).items())


def _active_adapters(model: Any) -> list[str]:
    if not getattr(model, "peft_config", None):
        return []
    active = model.active_adapters
    return list(active() if callable(active) else active)


def _adapter_settings(config: Any) -> dict[str, Any]:
    """The settings of an adapter that its output may depend on: no weight shows `lora_alpha` or rsLoRA."""
    settings: dict[str, Any] = config.to_dict()
    for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        settings.pop(name, None)
    return settings


def _plain(value: Any) -> Any:
    # The order of a set differs between processes
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _reference_tensors(model: PreTrainedModel, off: set[str]) -> dict[str, torch.Tensor]:
    """Tensors by the name they have in the model without adapters, less those of the adapters that are off."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if off & set(name.split(".")):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        tensors[plain] = tensor
    return tensors


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU with at least one dimension, gathered where this rank holds a part."""
    gathered: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if hasattr(tensor, "ds_id"):  # ZeRO-3 leaves the parameter itself empty
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([tensor])
    with gathered:
        whole = tensor.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        return torch.atleast_1d(whole).cpu().clone() if hasattr(tensor, "ds_id") else torch.atleast_1d(whole).cpu()


def pair_key(model: str, ids: Sequence[Ids], scored: Sequence[int | Ids], dtype: str, ld_alpha: float | None) -> bytes:
    """Key of one pair: 16 bytes.

    Args:
        model: `fingerprint` of the reference.
        ids: token ids of prompt + chosen and of prompt + rejected, as forwarded.
        scored: how many tokens at the end of each are the completion; or, where not all of them are scored, 1 at those
            that are.
        dtype: that the forward computes in.
        ld_alpha: LD-DPO's weight of the longer answer's tail, or None.
    """
    head = json.dumps([model, dtype, ld_alpha]).encode()
    masks = [np.empty(0, np.int32) if isinstance(own, int) else np.asarray(own, np.int32) for own in scored]
    counts = [own if isinstance(own, int) else -len(own) - 1 for own in scored]
    # All lengths come first, so that no two pairs give the same bytes
    digest = hashlib.blake2b(np.array([len(head), *map(len, ids), *counts], np.int64).tobytes(), digest_size=16)
    digest.update(head)
    for part in (*ids, *masks):
        digest.update(np.asarray(part, np.int32).tobytes())
    return digest.digest()


class RefCache:
    """Summed log-probs of chosen and rejected, by `pair_key`. Safe under several runs and a kill at any moment.

    Of a launch of several processes the first one alone opens the file: its folder may be on NFS, whose locks many
    processes would wait for. No connection outlives a call.

    Raises:
        UserError: the folder cannot be written, or the file in it is not a cache.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = (Path(folder) if folder else DEFAULT_CACHE).expanduser() / _DATABASE
        if is_first():
            with self._database() as database:
                database.execute("CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, chosen REAL, rejected REAL)")
                database.execute("CREATE TABLE IF NOT EXISTS models (key BLOB PRIMARY KEY, fingerprint TEXT)")

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=_LOCK_SECONDS)) as database, database:
                yield database
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--ref_cache: {self.path} cannot be used ({error}); remove it or name a folder") from error

    def read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """The entries there are among `keys`, as (chosen, rejected) in nats."""
        found = {}
        with self._database() as database:
            for start in range(0, len(keys), 500):  # SQLite takes so many variables in one statement
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, chosen, rejected FROM pairs WHERE key IN ({marks})"
                found.update({key: (chosen, rejected) for key, chosen, rejected in database.execute(query, some)})
        return found

    def write(self, entries: Mapping[bytes, tuple[float, float]]) -> None:
        """Add entries in one transaction. What is not finite is not kept, and what is there stays as it is."""
        rows = [(key, *values) for key, values in entries.items() if np.isfinite(values).all()]
        with self._database() as database:
            database.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def writer(self) -> Iterator[Callable[[Mapping[bytes, tuple[float, float]]], None]]:
        """A function that has a thread `write` entries every few seconds, and all of them at the end.

        Other runs may hold the file's lock for long: nothing waits for them meanwhile. A kill loses those seconds.

        Raises:
            UserError: of the function's next call or at the end, where they could not be written.
        """
        waiting: dict[bytes, tuple[float, float]] = {}
        lock, done = threading.Lock(), threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="reference cache") as pool:

            def commit() -> None:
                with lock:
                    entries = waiting.copy()
                    waiting.clear()
                if entries:
                    self.write(entries)

            def commits() -> None:
                while not done.wait(COMMIT_SECONDS):
                    commit()

            running = pool.submit(commits)

            def put(entries: Mapping[bytes, tuple[float, float]]) -> None:
                if running.done():
                    running.result()
                with lock:
                    waiting.update(entries)

            try:
                yield put
            finally:
                done.set()
                running.result()
                commit()

    def fingerprint_of(self, key: bytes) -> str | None:
        """The fingerprint that was kept under a `source_key`."""
        with self._database() as database:
            found = database.execute("SELECT fingerprint FROM models WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None

    def keep_fingerprint(self, key: bytes, fingerprint: str) -> None:
        """Keep the fingerprint of a model under its `source_key`."""
        with self._database() as database:
            database.execute("INSERT OR IGNORE INTO models VALUES (?, ?)", (key, fingerprint))
