"""The splits of one source, a file, a folder or a data set on the Hub: their names, and their raw rows."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tandem.data import hub, split_names
from tandem.data.files import SUFFIXES, is_data_file, read_rows
from tandem.data.layout import CARD, Splits, folder_splits, read_saved
from tandem.data.options import DataOptions
from tandem.data.rows import Row, RowError
from tandem.errors import UserError
from tandem.ranks import tell_once

Located = tuple[str, int, Row | RowError]  # source, row number, row or what is wrong with it


def base_of(split: str) -> str:
    return split.split("[")[0]


def is_local(name: str) -> bool:
    """Whether `name` means a path here rather than a Hub name: it exists, or could not be a Hub name."""
    return name.startswith((".", "/", "~")) or is_data_file(name) or Path(name).exists()


def local_splits(name: str, config: str | None = None) -> Splits:
    """The data files of a path, by split; `config` is one that a folder's dataset card has.

    Raises:
        UserError: there are none, or they cannot be told apart.
    """
    try:
        return _local_splits(name, Path(name).expanduser(), config)
    except (OSError, RuntimeError) as error:  # of a name too long, no permission, or the ~ of nobody
        raise UserError(f"--dataset_name {name}: {getattr(error, 'strerror', None) or error}") from error


def _local_splits(name: str, path: Path, config: str | None) -> Splits:
    if path.is_dir():
        return folder_splits(path, config)
    if not path.is_file():
        raise UserError(
            f"--dataset_name {name}: " + ("not a file or folder" if path.exists() else "no such file or folder")
        )
    if not is_data_file(path.name):
        raise UserError(f"--dataset_name {name}: not one of {', '.join(SUFFIXES)}")
    if config is not None:
        raise UserError(f"--dataset_config has no effect: {name} is a file here, not on the Hub")
    return {split_names.TRAIN: [path]}


def _names(options: DataOptions) -> Sequence[str]:
    """The splits that a source has."""
    if is_local(options.dataset_name):
        return tuple(local_splits(options.dataset_name, options.dataset_config))
    return hub.split_names(options.dataset_name, options.dataset_config, options.dataset_revision)


def _found(options: DataOptions, split: str) -> str | None:
    """The name that a source has for `split`, without a slice; None if it has none."""
    base = base_of(split)
    names = _names(options)
    found = split_names.named(names, base)
    if found is None and base == split_names.TRAIN:
        return split_names.training_split(names)
    if found is None and base == split_names.TEST:
        return split_names.held_out_split(names, _found(options, options.dataset_train_split) or split_names.TRAIN)
    return found


def _resolved(options: DataOptions, split: str) -> str:
    """`split` with its slice, under the name that the source has for it.

    Raises:
        UserError: it has none.
    """
    base, bracket, cut = split.partition("[")
    found = _found(options, base)
    if found is None:
        raise _no_split(options, base)
    if found != base:
        tell_once(f"{options.dataset_name} has no split {base}: using {found}")
    return found + bracket + cut


def _no_split(options: DataOptions, split: str) -> UserError:
    base, names = base_of(split), _names(options)
    hint = "see --val_ratio"
    if base == split_names.TRAIN or (base == split_names.TEST and any(map(split_names.is_held_out, names))):
        hint = f"name one with --dataset_{base}_split"
    return UserError(f"--dataset_name {options.dataset_name}: no split {base} (has {', '.join(names)}); {hint}")


def files_of(options: DataOptions, split: str) -> tuple[str, list[Path]]:
    """A split of a local source under its own name, with its slice, and its files; folders that `save_to_disk` wrote.

    Raises:
        UserError: it has no such split, or no files for it.
    """
    name, config = options.dataset_name, options.dataset_config
    if options.dataset_revision:
        raise UserError(f"--dataset_revision has no effect: {name} is here, not on the Hub")
    split = _resolved(options, split)
    files = local_splits(name, config)[base_of(split)]
    if not files:
        raise UserError(f"--dataset_name {name}: no file matches what its {CARD} says of the split {base_of(split)}")
    return split, files


def read_split(options: DataOptions, split: str) -> Iterable[Located]:
    if not is_local(options.dataset_name):
        return _read_hub(options, split)
    split, files = files_of(options, split)
    located = [
        (str(file), number, row)
        for file in files
        for number, row in (read_saved(file) if file.is_dir() else read_rows(file))
    ]
    return _slice(located, split)


def load_hub(options: DataOptions, split: str) -> tuple[str, Iterable[Any]]:
    """A split of a source on the Hub under its own name, with its slice, and its rows.

    Raises:
        UserError: it cannot be loaded.
    """
    where = options.dataset_name, options.dataset_config, options.dataset_revision
    try:
        return split, hub.load(*where, split)
    except UserError:
        try:
            is_there = base_of(split) in hub.split_names(*where)
        except UserError:  # what failed first says more
            is_there = True
        if is_there:
            raise
        split = _resolved(options, split)
        return split, hub.load(*where, split)


def _read_hub(options: DataOptions, split: str) -> Iterator[Located]:
    split, rows = load_hub(options, split)
    for number, row in enumerate(rows, 1):
        yield f"{options.dataset_name} {split}", number, dict(row)


def _slice(located: list[Located], split: str) -> list[Located]:
    if "[" not in split:
        return located
    from datasets import ReadInstruction

    base = base_of(split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: len(located)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split}: {error}") from error
    return [item for part in parts for item in located[part.from_ : part.to]]


def has_test_split(options: DataOptions) -> bool:
    """Whether a source, which is no mixture, has held-out pairs of its own.

    Raises:
        UserError: it cannot be asked for, or has several splits that could be meant, or not the one that was named.
    """
    if _found(options, options.dataset_test_split) is not None:
        return True
    if base_of(options.dataset_test_split) != split_names.TEST or any(map(split_names.is_held_out, _names(options))):
        raise _no_split(options, options.dataset_test_split)
    return False
