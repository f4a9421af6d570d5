"""Reference log-probs on disk, keyed by what they depend on and by nothing else.

A pair's entry is keyed by the reference's weights and configuration, its adapter's too, the token ids of both rows as
they are forwarded (after truncation) and which of them are scored, the dtype of the forward, and `ld_alpha`. So a sweep
over β, learning rate, loss, epochs, order or subset scores each pair once ever, and a change of template, tokenizer,
truncation, adapter or of one weight finds nothing.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tandem.errors import UserError
from tandem.ranks import is_first

DEFAULT_CACHE = Path("~/.cache/tandem/reference")
_DATABASE = "log_probs.sqlite"
# Another run may hold the write lock for as long as its own insert takes
_LOCK_SECONDS = 60


def fingerprint(model: PreTrainedModel, *, adapter: bool = True) -> str:
    """Hex digest of all that the log-probs of the reference `model` come from: weights and configuration, its
    adapter's too.

    The same in one piece as sharded. Collective where it is sharded.

    Args:
        adapter: whether a PEFT model is the reference with its active adapters on. Without, it has the fingerprint of
            its base.
    """
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures", "pad_token_id"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    known = getattr(model, "peft_config", {})
    active = _active_adapters(model) if adapter else []
    for name in sorted(active):
        digest.update(json.dumps(_adapter_settings(known[name]), sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(_reference_tensors(model, off=set(known) - set(active)).items()):
        whole = _whole(tensor)
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _active_adapters(model: Any) -> list[str]:
    if not getattr(model, "peft_config", None):
        return []
    active = model.active_adapters
    return list(active() if callable(active) else active)


def _adapter_settings(config: Any) -> dict[str, Any]:
    """What of an adapter's configuration its output may depend on: `lora_alpha` and rsLoRA are in no weight."""
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


def pair_key(
    model: str, ids: Sequence[Sequence[int]], scored: Sequence[int | Sequence[int]], dtype: str, ld_alpha: float | None
) -> bytes:
    """Key of one pair: 16 bytes.

    Args:
        model: `fingerprint` of the reference.
        ids: token ids of prompt + chosen and of prompt + rejected, as forwarded.
        scored: how many tokens at the end of each are the completion; or, where not all of them are scored, 1 at those
            that are.
        dtype: that the forward computes in.
        ld_alpha: LD-DPO's weight of the longer answer's tail, or None.
    """
    text = json.dumps([model, ids, scored, dtype, ld_alpha], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


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
