"""Digests of models and data by their content: a copy, or a file with a new date, keeps its digest."""

import contextlib
import json
from pathlib import Path

from tandem.runs import CONFIG, MANIFEST, RUN, contents, file_hash, is_complete, model_files, sha256_json, write_atomic

_BESIDE_THE_MODEL = (RUN, CONFIG, "training_metrics.json")


def manifest_digest(folder: str | Path) -> str | None:
    """The digest of the model in `folder`, from its manifest alone; None where the folder is not complete."""
    if not is_complete(folder):
        return None
    return sha256_json({name: digest for name, digest in contents(folder).items() if name not in _BESIDE_THE_MODEL})


def model_digest(folder: str | Path) -> str | None:
    """The digest of the model or adapter in `folder`, from its manifest, else from its files. None for a Hub name."""
    if not Path(folder).is_dir():
        return None
    return manifest_digest(folder) or sha256_json({file.name: file_hash(file) for file in model_files(folder)})


class Hashes:
    """Hashes of files, kept so that an unchanged file is read once.

    A file counts as unchanged by its inode, size, date and change time. The last is set by the kernel alone, so that a
    replaced file is read again even where its size and date are the old file's.

    Args:
        file: where the hashes are kept.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = dict(json.loads(file.read_text()))
        self._before = dict(self._known)

    def of(self, file: Path) -> str:
        """The hash of a file's content."""
        path, found = str(file.resolve()), file.stat()
        same = sha256_json([found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
        if path not in self._known or self._known[path][0] != same:
            self._known[path] = [same, file_hash(file)]
        return self._known[path][1]

    def of_folder(self, folder: Path) -> str:
        """The digest of all files in a folder and below it, without hidden ones and training checkpoints."""
        found = {}
        for file in sorted(folder.rglob("*")):
            place = file.relative_to(folder)
            aside = any(part.startswith((".", "checkpoint-")) for part in place.parts)
            if not aside and file.is_file() and file.name != MANIFEST:
                found[str(place)] = self.of(file)
        return sha256_json(found)

    def save(self) -> None:
        """Write the hashes to their file, if there are new ones."""
        if self._known != self._before:
            write_atomic(self._file, json.dumps(self._known, indent=0) + "\n")
