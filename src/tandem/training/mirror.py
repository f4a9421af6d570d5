"""The mirror of a run (`--mount_dir`): a copy of its folder on another disk, which outlives the machine.

In training a thread copies while the next steps are trained, so that a slow drive holds nothing up. It copies whole
checkpoints only; of the other files, those that training goes on writing are logs, of which each prefix is right.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tandem.errors import UserError
from tandem.log import logger
from tandem.monitor import packs
from tandem.runs import (
    LOCK,
    MANIFEST,
    RUN,
    checkpoints,
    damage,
    discard,
    is_complete,
    is_temporary,
    put_aside_after,
    run_id,
    step_of,
    sync,
    write_atomic,
)

_MARGINS = Path("logs", "margins")
_PASSES = 3  # over files of which some change while they are copied, as logs always may


class Mirror(TrainerCallback):
    """Copies a run's folder into `mount`/NAME at every save and at the end, and brings it back on a fresh machine.

    The copy's `run.json` says which run it is of. Rank 0 alone uses it.

    Args:
        source: the run's folder; NAME is its name.
        mount: `--mount_dir`.
    """

    def __init__(self, source: Path, mount: Path) -> None:
        self.source, self.folder = source, mount / source.resolve().name
        # Size and time of each original when it was copied. A copy is then assumed to be there: to look for each file
        # of a long run on a drive takes minutes, and a mounted drive may not keep times
        self._copied: dict[Path, tuple[int, int]] = {}
        self._whole: set[str] = set()  # checkpoints that are whole in the mirror, and the same as here
        self._ids: dict[str, str | None] = {}  # by checkpoint of the mirror: the run that made it
        self._thread: ThreadPoolExecutor | None = None
        self._asked: list[Future[None]] = []

    def refuse_foreign(self, ids: Iterable[str], start_over: bool) -> None:
        """Refuse a mirror that this run must neither overwrite nor be restored from.

        Args:
            ids: of the run in `source` and of those that it has replaced there; none where there is no run.
            start_over: whether the run starts over, so that nothing is restored.

        Raises:
            UserError: it is another run's, or holds files that are no run's mirror.
        """
        if not self.folder.exists() or all(map(is_temporary, self.folder.iterdir())):
            return
        way_out = "choose another --mount_dir, or move that folder away"
        mirrored = run_id(self.folder)
        if mirrored is None:
            raise UserError(f"--mount_dir: {self.folder} holds files that are no run's mirror: {way_out}")
        known = set(ids)
        if mirrored not in known and (known or start_over):
            raise UserError(f"--mount_dir: {self.folder} is the mirror of another run ({mirrored}): {way_out}")

    def holds_more(self) -> bool:
        """Whether the mirror has what the run's folder lacks: the finished model, or a later whole checkpoint."""
        if is_complete(self.source):
            return False
        return is_complete(self.folder) or bool(self._later())

    def _later(self) -> list[Path]:
        """Whole checkpoints of the mirror that follow all whole ones of the run's folder."""
        step = max((step_of(path) for path in checkpoints(self.source) if is_complete(path)), default=0)
        return [path for path in checkpoints(self.folder) if step_of(path) > step and is_complete(path)]

    def bring_back(self, whole: bool) -> None:
        """Copy into the run's folder what it has lost.

        Args:
            whole: the manifest too, which says that the run has finished.

        Raises:
            UserError: the run's folder cannot be written.
        """
        with self._errors(self.source):
            restored = {path.name for path in self._later()}
            for name in restored:
                if (self.source / name).exists():  # torn, or damaged
                    discard(self.source / name)
            for file in _manifests_last(self.folder):
                place = file.relative_to(self.folder)
                if place.parts[0].startswith("checkpoint-") and place.parts[0] not in restored:
                    continue
                if place == Path(MANIFEST) and not (whole and damage(self.folder) is None):
                    continue
                copy_file(file, self.source / place)

    def claim(self) -> None:
        """Mark the mirror as that of the run that starts or resumes in `source`, and as unfinished.

        Raises:
            UserError: it cannot be written.
        """
        with self._errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            former, own = run_id(self.folder), run_id(self.source)
            if former not in (None, own):  # `source` has started over; `refuse_foreign` has seen that it may
                for path in checkpoints(self.folder):
                    if run_id(path) == former:
                        discard(path)
            write_atomic(self.folder / RUN, (self.source / RUN).read_bytes())

    def put_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps, as is done in the run's folder.

        Raises:
            UserError: the mirror cannot be written.
        """
        with self._errors(self.folder):
            put_aside_after(step, self._own())

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Within the block, a thread makes the copies that saves ask for; at its end all copies are complete.

        Raises:
            UserError: at the next step, save or removal of a checkpoint, or at the end: the mirror cannot be written.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror") as self._thread:
            try:
                yield
            except BaseException:
                try:
                    self.join()
                except UserError as error:
                    logger.error("%s", error)  # beside what has ended the run
                raise
            else:
                self.join()
            finally:
                self._thread = None

    def join(self) -> None:
        """Wait until all copies that were asked for are made.

        Raises:
            UserError: the mirror cannot be written.
        """
        asked, self._asked = self._asked, []
        for copy in asked:
            copy.result()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if self._thread is None:
            self.copy()
            return
        self._tell()
        if len(self._asked) < 2:  # one that has not begun yet will find all that is there
            self._asked.append(self._thread.submit(self.copy))

    def _tell(self) -> None:
        """Raise the error with which a copy has failed, if any."""
        while self._asked and self._asked[0].done():
            self._asked.pop(0).result()

    def copy(self) -> None:
        """Bring the mirror up to date; manifests go last, as they do in the original.

        Where the mirror has more than the original, only the run's own older checkpoints are removed, once a newer one
        is whole, and the files of margins that are packed now.

        Raises:
            UserError: the mirror cannot be written.
        """
        with self._errors(self.folder):
            new = self._new_checkpoints()
            for name in new:  # of another life of this run, if it is there
                (self.folder / name / MANIFEST).unlink(missing_ok=True)
                self._ids.pop(name, None)
            for _ in range(_PASSES):
                found = self._to_copy(new)
                if self._copy_all(file for file in found if file.name != MANIFEST):
                    break
            for file in found:
                if file.name == MANIFEST:
                    self._update(file)
            self._whole |= new
            self._remove_older()

    def _new_checkpoints(self) -> set[str]:
        """Whole checkpoints of the run's folder that the mirror lacks, by name. One that is being written is not."""
        found = {path.name for path in checkpoints(self.source) if (path / MANIFEST).exists()} - self._whole
        self._whole |= {name for name in found if _is_copied(self.source / name, self.folder / name)}
        return found - self._whole

    def _to_copy(self, new: set[str]) -> list[Path]:
        """All files of the run, of its checkpoints only the `new` ones."""
        return _manifests_last(self.source, {path.name for path in checkpoints(self.source)} - new)

    def _copy_all(self, files: Iterable[Path]) -> bool:
        """Copy those of `files` that have changed. Returns whether each was there and did not change meanwhile."""
        steady, packed = True, []
        for file in files:
            try:
                new = self._update(file)
                steady &= not new or self._copied[file] == _version(file)
            except FileNotFoundError:  # a log's temporary file, or margins that are in a pack by now
                new = steady = False
            if new and packs.is_pack(file):
                packed.append(file)
        if packed:
            packs.drop_files(packed, self.folder / _MARGINS)
        return steady

    def _remove_older(self) -> None:
        mine = self._own()
        newest = max((step_of(path) for path in mine if path.name in self._whole or is_complete(path)), default=0)
        for path in mine:
            if step_of(path) < newest and not (self.source / path.name).exists():
                discard(path)
                self._whole.discard(path.name)

    def _own(self) -> list[Path]:
        found = checkpoints(self.folder)
        for path in found:
            if self._ids.get(path.name) is None:
                self._ids[path.name] = run_id(path)
        own = run_id(self.source)
        return [path for path in found if self._ids[path.name] == own]

    def is_up_to_date(self) -> bool:
        """Whether the mirror has all of the finished run."""
        return _is_copied(self.source, self.folder)

    def _update(self, file: Path) -> bool:
        """Copy a file, unless that was done. Returns whether it has changed since this process saw it last.

        Raises:
            FileNotFoundError: it is not there.
        """
        copy, version = self.folder / file.relative_to(self.source), _version(file)
        known = self._copied.get(file) == version
        if not (known and self._thread is not None) and not is_there(copy, None if known else version):
            copy_file(file, copy)
        self._copied[file] = version
        return not known

    @contextlib.contextmanager
    def _errors(self, written: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--mount_dir {self.folder.parent}: cannot write {written}: {error.strerror or error}; "
                f"what {self.source} holds is whole; put that right, and the same command goes on there"
            ) from error


def _manifests_last(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """The files of a run, but those in its folders `without`. A checkpoint's `run.json` goes first: a copy that is cut
    off says whose it is."""
    found = []
    for place, folders, names in os.walk(folder):
        if place == str(folder):
            folders[:] = [name for name in folders if name not in without]
        found += [(name == MANIFEST, place, name != RUN, name) for name in names if name != LOCK]
    files = (Path(place, name) for _, place, _, name in sorted(found))
    return [file for file in files if not is_temporary(file)]


def _version(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def is_there(file: Path, version: tuple[int, int] | None) -> bool:
    """Whether there is such a file, of this version if one is given."""
    try:
        return version in (None, _version(file))
    except FileNotFoundError:
        return False


def copy_file(file: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.name}.part")
    shutil.copy2(file, part)
    sync(part)
    part.replace(copy)


def _is_copied(folder: Path, copy: Path) -> bool:
    """Whether both are whole and list the same content."""
    with contextlib.suppress(OSError, ValueError):
        same = json.loads((folder / MANIFEST).read_text()) == json.loads((copy / MANIFEST).read_text())
        return same and is_complete(copy)
    return False
