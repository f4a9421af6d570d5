"""The margins of long runs: beyond 10,000 steps, the arrays of a thousand steps are one file.

    <folder>/steps_10001_11000.npz     a ZIP file of the arrays of those steps, by the names that they had as files

    python -m tandem.monitor.packs RUN/logs/margins      gives each array its file again

The first 10,000 steps keep their files, and so does the thousand that is being written. Where a step has both, a file
and a place in a pack, the file is right: a pack is whole before a file of it is removed.
"""

import contextlib
import functools
import io
import os
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

from tandem.errors import UserError, script_main
from tandem.runs import write_atomic

LOOSE = 10_000
PER_PACK = 1_000
_PACK = re.compile(r"steps_(\d+)_(\d+)\.npz")
_ARRAY = re.compile(r"epoch_\d+/step_(\d+)\.npy")


def pack_of(folder: Path, step: int) -> Path | None:
    """Where the array of a step goes once its thousand is closed; None for a step that keeps its file."""
    if step <= LOOSE:
        return None
    last = -(-step // PER_PACK) * PER_PACK
    return folder / f"steps_{last - PER_PACK + 1:05d}_{last:05d}.npz"


def last_step(pack: Path) -> int:
    """The last step that a pack may hold."""
    return _bounds(pack)[1]


def _bounds(pack: Path) -> tuple[int, int]:
    found = _PACK.fullmatch(pack.name)
    assert found is not None
    return int(found[1]), int(found[2])


def is_pack(file: Path) -> bool:
    """Whether a file is a pack, by its name."""
    return _PACK.fullmatch(file.name) is not None


def packs(folder: Path) -> list[Path]:
    """The packs of a margins folder, by step."""
    found = [file for file in folder.glob("steps_*.npz") if is_pack(file)]
    return sorted(found, key=_bounds)


def files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Each array that is a file, with its step. A folder is listed once, and no file is looked at."""
    for epoch in folder.glob("epoch_*"):
        if epoch.is_dir():
            with os.scandir(epoch) as entries:
                names = [f"{epoch.name}/{entry.name}" for entry in entries]
            yield from ((int(found[1]), folder / found[0]) for name in names if (found := _ARRAY.fullmatch(name)))


def read(array: Path) -> bytes | None:
    """The content of an array's file, `<folder>/epoch_001/step_10012.npy`, from its pack; None if it is not there."""
    folder, name = array.parents[1], f"{array.parent.name}/{array.name}"
    found = _ARRAY.fullmatch(name)
    pack = pack_of(folder, int(found[1])) if found else None
    if pack is None or not pack.exists():
        return None
    status = pack.stat()
    return _kept(pack, (status.st_ino, status.st_size, status.st_mtime_ns)).get(name)


@functools.lru_cache(maxsize=1)
def _kept(pack: Path, version: tuple[int, int, int]) -> dict[str, bytes]:
    """`_arrays`, kept for whoever reads one step after the other."""
    return _arrays(pack)


def close(pack: Path) -> None:
    """Bring the arrays of a pack's steps into it, and remove their files."""
    first, last = _bounds(pack)
    own = [file for step, file in files(pack.parent) if first <= step <= last]
    if own:
        arrays = _arrays(pack) | {_name(file): file.read_bytes() for file in own}
        _write(pack, arrays)
        _remove(own)


def close_until(folder: Path, step: int) -> None:
    """Close every thousand that ends with `step` or before: those that a kill has kept from it."""
    found = {pack for number, _ in files(folder) if (pack := pack_of(folder, number)) and last_step(pack) <= step}
    for pack in sorted(found):
        close(pack)


def cut_after(folder: Path, step: int) -> None:
    """Remove the arrays of all steps after `step`, in packs and as files."""
    for pack in packs(folder):
        first, last = _bounds(pack)
        if first > step:
            pack.unlink()
        elif last > step:
            kept = {name: content for name, content in _arrays(pack).items() if _step(name) <= step}
            if not kept:
                pack.unlink()
            elif len(kept) < len(_names(pack)):
                _write(pack, kept)
    _remove([file for number, file in files(folder) if number > step])


def drop_files(packed: Collection[Path], copy: Path) -> None:
    """In a copy of the margins folder of the packs: remove the files that are in one of them, and that the original
    has no more."""
    originals = {name: pack.parent / name for pack in packed for name in _names(pack)}
    _remove([file for _, file in files(copy) if (own := originals.get(_name(file))) and not own.exists()])


def unpack(folder: Path) -> int:
    """Give each array of the packs its file again, as it was; returns how many there were.

    Ended in between, it has changed no content, and may be done again.
    """
    count = 0
    for pack in packs(folder):
        for name, content in _arrays(pack).items():
            if not (folder / name).exists():
                write_atomic(folder / name, content)
                count += 1
        pack.unlink()
    return count


def _step(name: str) -> int:
    found = _ARRAY.fullmatch(name)
    assert found is not None
    return int(found[1])


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


@contextlib.contextmanager
def _opened(pack: Path) -> Iterator[zipfile.ZipFile]:
    """The pack for reading.

    Raises:
        UserError: it is no whole ZIP file.
    """
    try:
        with zipfile.ZipFile(pack) as packed:
            yield packed
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{pack}: not the margins that a run has packed ({error}): remove it, or put it back"
        ) from error


def _names(pack: Path) -> list[str]:
    """The names of the arrays in a pack; none if there is no pack."""
    if not pack.exists():
        return []
    with _opened(pack) as packed:
        return [name for name in packed.namelist() if _ARRAY.fullmatch(name)]


def _arrays(pack: Path) -> dict[str, bytes]:
    """The content of each array's file in a pack, by name; none if there is no pack."""
    if not pack.exists():
        return {}
    with _opened(pack) as packed:
        return {name: packed.read(name) for name in _names(pack)}


def _write(pack: Path, arrays: dict[str, bytes]) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(name)  # with a fixed date: equal arrays, equal bytes
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, arrays[name])
    write_atomic(pack, content.getvalue())


def _remove(arrays: list[Path]) -> None:
    """Remove files, and the folders that are empty without them."""
    for file in arrays:
        file.unlink(missing_ok=True)
    for epoch in {file.parent for file in arrays}:  # looked at once a folder: after each file it would be quadratic
        if not any(epoch.iterdir()):
            epoch.rmdir()


def main(argv: list[str]) -> None:
    """Unpack the margins folder that the command line names.

    Raises:
        UserError: it names none.
    """
    folder = Path(argv[0]) if len(argv) == 1 else None
    if folder is None or not folder.is_dir():
        raise UserError("python -m tandem.monitor.packs FOLDER: a margins folder, as RUN/logs/margins")
    print(f"{unpack(folder)} arrays have files of their own again")


if __name__ == "__main__":
    script_main(main)
