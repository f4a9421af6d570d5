"""What a run leaves on disk: files that are whole or absent, and folders that a manifest marks as complete."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from tandem.errors import UserError
from tandem.log import logger

MANIFEST = "manifest.json"
RUN = "run.json"
CONFIG = "config.yaml"
LOCK = ".lock"
CARD = "README.md"
_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
COUNTERS = "tandem_counters.json"
_NOT_OF_THE_MODEL = (MANIFEST, RUN, COUNTERS, "training_metrics.json", "trainer_state.json")


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that it has its old content or its new one at any moment, whoever reads or kills.

    A kill may leave the temporary file, always under the same name: the next write takes it over, so that leftovers do
    not pile up.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with _held(temporary) as file:
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _held(path: Path) -> Iterator[Any]:
    """The file at `path`, open for this writer alone: others wait, in this process and in other ones."""
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    yield file
                    return
        # The writer before has renamed or removed the file since it was opened


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinities are refused (ValueError), since JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it, so that a kill tears at most the line being written.

    A torn last line that an earlier kill has left is removed first: appended to it, this record would be lost as well.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _drop_torn_tail(file)
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_tail(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a file written by `append_jsonl`; a missing file has none, and a torn last line is dropped."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is a torn line, or empty
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def staged_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends without an error.

    The manifest (each file with its size and hash) is written last and the rename is one step, so that a folder of this
    name is complete or absent. An older `path` is replaced; on an error it stays as it was.
    """
    path = Path(path)
    staging, outgoing = path.with_name(f".{path.name}.staging"), path.with_name(f".{path.name}.old")
    if is_complete(outgoing) and not path.exists():  # killed between its two renames
        os.rename(outgoing, path)
    for leftover in (outgoing, staging):
        if leftover.exists():
            discard(leftover)
    staging.mkdir(parents=True)
    yield staging
    write_manifest(staging)
    if path.exists():
        os.rename(path, outgoing)
        os.rename(staging, path)
        discard(outgoing)
    else:
        os.rename(staging, path)


@contextlib.contextmanager
def locked(folder: str | Path, patience: float = 0) -> Iterator[None]:
    """Hold a folder for this process by a lock on a file in it. The kernel frees the lock however the process ends.

    On NFS the server keeps the lock, so that other machines are kept out as well, unless the mount has `nolock` or
    `local_lock`. On a file system without locks (some FUSE mounts) nothing is locked. A missing folder is made, and
    removed again if nothing is put into it.

    Why not filelock (4.3): it does not say who holds the lock, leaves its file in the folder, and where the file system
    has no locks takes the mere file for a held lock: after a kill, no run could resume there.

    Args:
        patience: seconds to wait for a holder that may be going away.

    Raises:
        UserError: another process holds it, which is named.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    deadline = time.monotonic() + patience
    while (handle := _lock(folder / LOCK)) is None:
        if time.monotonic() >= deadline:
            holder = ""
            with contextlib.suppress(FileNotFoundError):  # the holder has just released it
                holder = (folder / LOCK).read_text().strip()
            raise UserError(f"{folder}: {holder or 'another process'} is writing there; wait for it, or end it")
        time.sleep(0.1)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # the folder is not empty
                os.rmdir(folder)


def _lock(path: Path) -> int | None:
    """The open file at `path` with the lock on it; None while another process holds the lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what is open for writing
        except FileNotFoundError:  # a holder has just removed the folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return handle
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # a holder has removed the file since it was opened


def write_manifest(folder: str | Path, files: Iterable[Path] | None = None) -> None:
    """Write the manifest of `folder`, which makes it complete: `files` (default: all) with their sizes and hashes.

    A model card is not listed, since people edit it. Each file is synced to the disk first, so that no manifest lists
    bytes that a power cut lost.
    """
    folder = Path(folder)
    listed = {}
    for file in sorted(folder.rglob("*") if files is None else files):
        if file.is_file() and file.name == CARD:
            sync(file)
        elif file.is_file() and file.name != MANIFEST:
            listed[str(file.relative_to(folder))] = {
                "bytes": file.stat().st_size,
                "xxh3_128": file_hash(file, sync=True),
            }
    write_json(folder / MANIFEST, {"files": listed})


def file_hash(file: Path, sync: bool = False) -> str:
    """Hex XXH3 of a file's bytes, 128 bits; with `sync`, of bytes that are on the disk by then."""
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        if sync:
            os.fsync(content.fileno())
        while block := content.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def is_temporary(file: Path) -> bool:
    """Whether a file is one that is still being written, or was when a kill came; a whole one has its final name."""
    return file.name.startswith(".") and file.suffix in (".part", ".tmp")


def sync(file: Path) -> None:
    """Wait until a file's content is on the disk: a file renamed before that can be empty after a power cut."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has a manifest and every file it lists has the size it lists. Reads no content."""
    return fault(folder) is None


def damage(folder: str | Path) -> str | None:
    """How `folder` differs from what its manifest says, in a few words; None if it doesn't. Reads every byte."""
    folder = Path(folder)
    found = fault(folder)
    if found is not None:
        return found
    for name, digest in contents(folder).items():
        if file_hash(folder / name) != digest:
            return f"the content of {name} has changed"
    return None


def checkpoints(folder: str | Path) -> list[Path]:
    """The training checkpoints in `folder`, whole or not, by ascending step."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def discard(folder: str | Path) -> None:
    """Remove a folder: its manifest first, so that a kill half-way leaves nothing that looks complete, and `run.json`
    last, so that what is left tells which run it was of."""
    folder = Path(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != RUN:
            os.unlink(entry.path)
    shutil.rmtree(folder)


def put_aside_after(step: int, found: Iterable[Path]) -> None:
    """Rename the `found` checkpoints of steps after `step` to `skipped_checkpoint-N`.

    One without a manifest was never complete, and is removed.
    """
    for path in found:
        if step_of(path) <= step:
            continue
        if not (path / MANIFEST).exists():
            discard(path)
            continue
        aside = path.with_name(f"skipped_{path.name}")
        if aside.exists():
            discard(aside)
        path.rename(aside)
        logger.warning("%s was moved to %s", path, aside.name)


def run_id(folder: str | Path) -> str | None:
    """The id of the run that made this run folder or checkpoint; None where its `run.json` gives none."""
    try:
        made_by = json.loads((Path(folder) / RUN).read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made_by if isinstance(made_by, str) else None


def fault(folder: str | Path) -> str | None:
    """What keeps `folder` from being complete, in a few words; None if nothing. Looks at sizes, not at content."""
    folder = Path(folder)
    try:
        sizes = {name: listed["bytes"] for name, listed in _listed(folder).items()}
    except FileNotFoundError:
        return "it has no manifest: its writing was cut off"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    for name, size in sizes.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def refusal(folder: str | Path) -> str | None:
    """Why the model in `folder` must not be merged or pushed; None if it may be. Reads every byte.

    A folder that was not written by a run or a merge of Tandem's is not judged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        if not (folder / CONFIG).exists():
            return None
        return "its training has not finished; run it again to resume it"
    reason = damage(folder)
    if reason is None:
        return None
    return (
        f"it is not what was trained or merged there: {reason}; put the file back, or, if the change is meant, "
        f"take the model's files into a folder of their own, without {MANIFEST}"
    )


def contents(folder: str | Path) -> dict[str, str]:
    """The files that the manifest of a complete folder lists, each with the hash of its content."""
    return {name: listed["xxh3_128"] for name, listed in _listed(Path(folder)).items()}


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    # Older manifests list the model card, which people edit
    return {name: listed for name, listed in files.items() if Path(name).name != CARD}


def model_files(folder: str | Path) -> list[Path]:
    """The files of the model or adapter in `folder`, without checkpoints, logs and pickled files."""
    return sorted(
        file
        for file in Path(folder).iterdir()
        if file.is_file() and file.suffix in _MODEL_FILES and file.name not in _NOT_OF_THE_MODEL
    )


def is_of_a_run(file: Path) -> bool:
    """Whether a file in a model's folder tells of its training, and so does not belong to a model made from it."""
    return file.name in _NOT_OF_THE_MODEL or file.name in (CONFIG, "train.log", "training_args.bin")


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of the canonical JSON of `value`: equal values have equal digests, whatever the key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
