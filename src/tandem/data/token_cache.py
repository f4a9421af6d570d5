"""Sets of tokenized rows on disk, under keys of what they were made from: complete or absent, and memory-mapped.

A set is a folder of Arrow files with `set.json`, which describes them and is written last; the folder is renamed to
its key once everything is on the disk. A process that builds a set holds an exclusive lock, for which others wait;
processes that use a set hold a shared lock, so that no set is removed while it is in use.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tandem.errors import UserError
from tandem.log import logger
from tandem.ranks import tell_once
from tandem.runs import file_hash, sha256_json

Json = dict[str, Any]

CACHE = "TANDEM_CACHE"  # variable that names a folder to use in place of ~/.cache/tandem
_ABOUT = "set.json"
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_KEY = re.compile(r"[0-9a-f]+")
_LEFTOVER = re.compile(r"\.[0-9a-f]+\.[0-9a-f]{32}\.part")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, int] = {}
"""The locks of the sets that this process uses. The kernel frees them when it ends."""


@dataclass(frozen=True)
class Tokenized:
    """A set in use.

    Attributes:
        tables: memory-mapped, by the names of their files.
        about: what the builder returned.
        is_new: whether it was built now.
    """

    tables: dict[str, pa.Table]
    about: Json
    is_new: bool


Build = Callable[[Path], Json]
"""Writes `NAME.arrow` files (Arrow's stream format) into a folder, and returns a description of them for JSON."""


class TokenCache:
    """A folder of sets.

    Args:
        folder: unset: `tokens` in the folder that TANDEM_CACHE names, or in ~/.cache/tandem.
        limit: bytes of all sets; beyond it, the sets that were unused for longest are removed, except those in use.
    """

    def __init__(self, folder: str | Path | None, limit: int) -> None:
        usual = Path(os.environ.get(CACHE) or "~/.cache/tandem") / "tokens"
        self.folder, self.limit = Path(folder or usual), limit
        with contextlib.suppress(RuntimeError):  # no such user, or one without a home: told when it is used
            self.folder = self.folder.expanduser()

    def get(self, key: str, build: Build) -> Tokenized:
        """The set of this key; built, if there is no complete one.

        Raises:
            UserError: the disk is full or read-only; or what `build` raises. Nothing is left of the set then.
        """
        path = self.folder / key
        try:
            with _told_apart():
                if self.folder.parts[:1] and self.folder.parts[0].startswith("~"):
                    raise OSError(errno.ENOENT, "no such home folder")
                self.folder.mkdir(parents=True, exist_ok=True)
                if path not in _held:
                    _held[path] = self._lock(f".{key}.used", fcntl.LOCK_SH)
            found = _read(path, is_new=False) or self._built(path, build)
        except _Unusable as error:
            tell_once(f"{self.folder} cannot be written ({error}), so tokens are kept for this run alone")
            return unkept(build)
        with contextlib.suppress(OSError):  # the file is another user's
            os.utime(path / _ABOUT)
        if found.is_new:
            self._evict()
        return found

    def _built(self, path: Path, build: Build) -> Tokenized:
        """The set, built by this process or by another one that it has waited for."""
        name = f".{path.name}.build"
        with _told_apart():
            lock = self._lock(name, fcntl.LOCK_EX)
        try:
            if (found := _read(path, is_new=False)) is None:
                with _disk_errors(self.folder):
                    self._build(path, build)
                found = _read(path, is_new=True)
        finally:
            with contextlib.suppress(OSError):  # the file is another user's
                (self.folder / name).unlink()
            os.close(lock)
        if found is None:
            raise UserError(f"--token_cache {path}: is not what was just written there: the disk is broken")
        return found

    def _build(self, path: Path, build: Build) -> None:
        for leftover in self.folder.glob(f".{path.name}.*.part"):  # of builders that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        part = self.folder / f".{path.name}.{uuid.uuid4().hex}.part"
        with _told_apart(_DENIED):
            if path.exists():
                logger.warning("%s is damaged, and is built anew", path)
                self._remove(path)
            part.mkdir()
        try:
            _write(part, build)
            try:
                os.rename(part, path)
            except OSError as error:  # a machine that the locks do not reach was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Remove a set; it is renamed first, so that a kill leaves no part of it under its key."""
        aside = self.folder / f".{path.name.strip('.').split('.')[0]}.{uuid.uuid4().hex}.part"
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _lock(self, name: str, kind: int) -> int:
        """Wait for the lock on a file; returns the file's descriptor.

        Raises:
            BlockingIOError: another process has it, and `kind` says not to wait.
        """
        path = self.folder / name
        while True:
            handle = _opened(path)
            try:
                _flock(handle, kind)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(handle), os.stat(path)):
                        return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # a holder has removed the file since it was opened

    def _evict(self) -> None:
        """Remove the sets that were unused for longest, until the rest is within the limit."""
        sets, total = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process has just removed it
                if _LEFTOVER.fullmatch(path.name):
                    sets.append((0.0, 0, path))
                elif _KEY.fullmatch(path.name) and (path / _ABOUT).is_file():
                    size = sum(file.stat().st_size for file in path.iterdir())
                    sets.append(((path / _ABOUT).stat().st_mtime, size, path))
                    total += size
        for _, size, path in sorted(sets):
            if (not size or total > self.limit) and self._dropped(path):
                total -= size

    def _dropped(self, path: Path) -> bool:
        """Remove a set, or what a kill left of one, unless it is being used or built. Returns whether it is gone."""
        name = f".{path.name.strip('.').split('.')[0]}.used"
        try:
            lock = self._lock(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            self._remove(path)
            (self.folder / name).unlink(missing_ok=True)
        except OSError:
            return False
        finally:
            os.close(lock)
        return True


def unkept(build: Build) -> Tokenized:
    """A set for this process alone: its files are removed at once, and exist until the process ends."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, _disk_errors(Path(folder)):
        _write(Path(folder), build)
        found = _read(Path(folder), is_new=True)
        assert found is not None
        return found


def mapped(file: Path) -> pa.Table:
    """The table in a file of Arrow's stream format, memory-mapped: processes that map it share its memory."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _write(folder: Path, build: Build) -> None:
    about = build(folder)
    files = {file.name: file_hash(file, sync=True) for file in sorted(folder.glob("*.arrow"))}
    content = {"files": files, "about": about}
    with open(folder / _ABOUT, "w", encoding="utf-8") as file:
        json.dump(content | {"sha256": sha256_json(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _read(path: Path, is_new: bool) -> Tokenized | None:
    """The set in a folder; None where there is none, or one whose content has changed."""
    try:
        content = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if sha256_json(content) != digest:
            return None
        if any(file_hash(path / name) != digest for name, digest in content["files"].items()):
            return None
        tables = {Path(name).stem: mapped(path / name) for name in content["files"]}
        return Tokenized(tables, content["about"], is_new)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have none for folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _flock(handle: int, kind: int) -> None:
    """Lock; on a file system without locks, go on without one: sets are complete or absent there too."""
    try:
        fcntl.flock(handle, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS or kind & fcntl.LOCK_NB:
            raise


def _opened(path: Path) -> int:
    """A lock's file; one of another user's, or in a folder that is read-only, is read, which suffices for locks."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in _DENIED:
            with contextlib.suppress(OSError):
                return os.open(path, os.O_RDONLY)
        raise


class _Unusable(Exception):
    """The folder, or what is in it of a set, is not this user's to write."""


@contextlib.contextmanager
def _told_apart(kinds: tuple[int, ...] | None = None) -> Iterator[None]:
    """Within the block, errors of the disk (of these `kinds` alone, if given) mean a folder that cannot be used."""
    try:
        yield
    except OSError as error:
        if kinds is not None and error.errno not in kinds:
            raise
        raise _Unusable(error.strerror) from error


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise UserError(
            f"--token_cache {folder}: cannot be written ({error.strerror}); make room, or name a folder elsewhere"
        ) from error
