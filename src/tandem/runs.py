"""What a run leaves on disk: files that are whole or absent, and folders that say when they are complete."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinities are refused (ValueError), since JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it, so that a kill tears at most the line being written.

    A torn last line left by an earlier kill is cut off first: appending to it would lose this record as well.
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
    """Yield an empty folder beside `path` that becomes `path` when the block ends well.

    The manifest (each file with its size) is written last and the rename is one step, so that a folder by this
    name is complete or absent. An older `path` is replaced; on an error nothing of it changes.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    write_manifest(staging)
    if path.exists():
        outgoing = path.with_name(f".{path.name}.old")
        shutil.rmtree(outgoing, ignore_errors=True)
        os.rename(path, outgoing)
        os.rename(staging, path)
        shutil.rmtree(outgoing)
    else:
        os.rename(staging, path)


def write_manifest(folder: str | Path) -> None:
    """List every file of `folder` with its size; written last, it is what makes a folder complete."""
    folder = Path(folder)
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` has a manifest and every file it lists has the size it lists."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of the canonical JSON of `value`: equal values have equal digests, whatever the key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
