"""The mirror of a run (`--mount_dir`): a copy of its folder on another disk, which outlives the machine."""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tandem.errors import UserError
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


class Mirror(TrainerCallback):
    """Copies a run's folder into `mount`/NAME at every save and at the end, and brings it back on a fresh machine.

    The copy's `run.json` says which run it is of. Rank 0 alone uses it.

    Args:
        source: the run's folder; NAME is its name.
        mount: `--mount_dir`.
    """

    def __init__(self, source: Path, mount: Path) -> None:
        self.source, self.folder = source, mount / source.resolve().name
        # Size and time of each original when it was copied: a mounted drive may not keep the times of its copies
        self._copied: dict[Path, tuple[int, int]] = {}

    def refuse_foreign(self, ids: Iterable[str], start_over: bool) -> None:
        """Refuse a mirror that this run may neither write over nor be restored from.

        Args:
            ids: of the run in `source` and of those that it has replaced there; none where there is no run.
            start_over: the run is not one to be gone on with, so that nothing is restored.

        Raises:
            UserError: another run's, or files of which none says what they are.
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
        """Whether the mirror has what the run's folder has lost: the finished model, or a later whole checkpoint."""
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
            whole: with the manifest that says that the run has finished.

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
                _copy(file, self.source / place)

    def claim(self) -> None:
        """Make the mirror that of the run that now begins, or goes on, in `source`: it is no finished one any more.

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
        """Move checkpoints of later steps away, as the run's folder does.

        Raises:
            UserError: the mirror cannot be written.
        """
        with self._errors(self.folder):
            put_aside_after(step, self._own())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.copy()

    def copy(self) -> None:
        """Bring the mirror up to date; manifests go last, as they do in the original.

        Of what the original lacks only the run's own older checkpoints are removed, once a newer one is whole.

        Raises:
            UserError: the mirror cannot be written.
        """
        with self._errors(self.folder):
            whole = {path.name for path in checkpoints(self.source) if _is_copied(path, self.folder / path.name)}
            for file in _manifests_last(self.source):
                place = file.relative_to(self.source)
                if place.parts[0] not in whole:
                    with contextlib.suppress(FileNotFoundError):  # a log's temporary file
                        self._update(file, self.folder / place)
            mine = self._own()
            newest = max((step_of(path) for path in mine if is_complete(path)), default=0)
            for path in mine:
                if step_of(path) < newest and not (self.source / path.name).exists():
                    discard(path)

    def _own(self) -> list[Path]:
        return [path for path in checkpoints(self.folder) if run_id(path) == run_id(self.source)]

    def is_up_to_date(self) -> bool:
        """Whether the finished run is all in the mirror."""
        return _is_copied(self.source, self.folder)

    def _update(self, file: Path, copy: Path) -> None:
        version = (file.stat().st_size, file.stat().st_mtime_ns)
        if self._copied.get(file) != version or not copy.exists():
            _copy(file, copy)
            self._copied[file] = version

    @contextlib.contextmanager
    def _errors(self, written: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--mount_dir {self.folder.parent}: cannot write {written}: {error.strerror or error}; "
                f"what {self.source} holds is whole; put that right, and the same command goes on there"
            ) from error


def _manifests_last(folder: Path) -> list[Path]:
    """The files of a run. A checkpoint's `run.json` goes first: a copy that is cut off says whose it is."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK and not is_temporary(file)]
    return sorted(files, key=lambda file: (file.name == MANIFEST, file.parent, file.name != RUN, file))


def _copy(file: Path, copy: Path) -> None:
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
