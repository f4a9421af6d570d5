"""The files of a data set in a folder, by split, as the Hub would read the folder.

In this order: what `save_to_disk` of `datasets` has written; the `configs:` of a dataset card (README.md); the names
of files and folders (`data.split_names`). Hidden files and folders and the Hub's own records are no data.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import yaml

from tandem.data.files import SUFFIXES, is_data_file
from tandem.data.formats import kind_of
from tandem.data.split_names import TRAIN, is_held_out, split_of
from tandem.errors import UserError
from tandem.options.yaml_text import TextLoader
from tandem.ranks import tell_once

Splits = dict[str, list[Path]]

CARD = "README.md"
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
# Not data to the Hub either
_RECORDS = {"config.json", "dataset_info.json", "dataset_infos.json", _SAVED, _SAVED_SPLITS}
_LONGEST_HEAD = 2**20  # characters of a card
_MOST_FILES = 100_000  # of a data set's folder: one with more is something else


def folder_splits(folder: Path, config: str | None = None) -> Splits:
    """The data files of a folder by split; a split that `save_to_disk` wrote is a folder instead of files.

    A split that the card lists is there without files if none matches.

    Args:
        config: which of the configurations in the card; unset: the only one, or the default one.

    Raises:
        UserError: no data, an unusable card, held-out files without training files, files of which only some name a
            split, or one that names two.
    """
    where = f"--dataset_name {folder}"
    saved = _saved(folder)
    configs = [] if saved else _configs(folder, where)
    if config is not None and not configs:
        raise UserError(f"--dataset_config has no effect: {folder} has no {CARD} with configs, and is not on the Hub")
    if saved:
        return saved
    if configs:
        return _of_config(folder, _chosen(configs, config, where), where)
    return _of_names(folder, where)


def _saved(folder: Path) -> Splits:
    """Splits that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    if (folder / _SAVED_SPLITS).is_file():
        parts = sorted(part for part in folder.iterdir() if (part / _SAVED).is_file())
        return {part.name: [part] for part in parts}
    return {TRAIN: [folder]} if (folder / _SAVED).is_file() else {}


def _configs(folder: Path, where: str) -> list[dict[str, Any]]:
    """The `configs` of the folder's dataset card; none without one."""
    card = folder / CARD
    if not card.is_file():
        return []
    try:
        with open(card, encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(_LONGEST_HEAD).splitlines()
        if not lines or lines[0].strip() != "---":
            return []
        front = "\n".join(itertools.takewhile(lambda line: line.strip() != "---", lines[1:]))
        if not re.search("^configs *:", front, re.MULTILINE):
            return []  # the rest of a head may be anything
        head = yaml.load(front, Loader=TextLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{where}: {CARD}: its head cannot be read: {getattr(error, 'strerror', error)}") from error
    configs = head.get("configs") if isinstance(head, dict) else None
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(
        isinstance(config, dict) and isinstance(config.get("config_name"), str) for config in configs
    ):
        raise UserError(f"{where}: {CARD}: configs must be a list of objects with config_name and data_files")
    return [config for config in configs if "data_files" in config or "data_dir" in config]


def _chosen(configs: list[dict[str, Any]], name: str | None, where: str) -> dict[str, Any]:
    """The configuration that is called `name`, or the one that the Hub takes without a name."""
    names = [config["config_name"] for config in configs]
    if name is not None:
        if name not in names:
            raise UserError(f"{where}: {CARD} has no configuration {name} (has {', '.join(names)})")
        return configs[names.index(name)]
    default = [config for config in configs if str(config.get("default")).lower() == "true"]
    default = default or [config for config in configs if config["config_name"] == "default"]
    if not default and len(configs) > 1:
        raise UserError(f"{where}: name one of its configurations with --dataset_config: {', '.join(names)}")
    return (default or configs)[0]


def _of_config(folder: Path, config: dict[str, Any], where: str) -> Splits:
    name = config["config_name"]
    base = folder
    if (part := config.get("data_dir")) is not None:
        base = folder / _inside(part, name, where)
    if "data_files" not in config:
        return _of_names(base, where)
    return {
        split: sorted({file for pattern in patterns for file in _matching(base, pattern, name, where)})
        for split, patterns in _patterns(config["data_files"], name, where).items()
    }


def _patterns(given: Any, name: str, where: str) -> dict[str, list[str]]:
    """`data_files` of a card: a pattern, a list of them, or a list of `split` and `path`; or an object."""
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    if isinstance(given, str):
        given = [given]
    patterns: dict[str, list[str]] = {}
    for entry in given if isinstance(given, list) else [given]:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (TRAIN, entry)
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not paths or not all(isinstance(each, str) for each in paths):
            raise UserError(f"{where}: {CARD}: data_files of {name} must be paths, or objects with split and path")
        patterns.setdefault(split, []).extend(paths)
    if not patterns:
        raise UserError(f"{where}: {CARD}: data_files of {name} is empty")
    return patterns


def _inside(path: Any, name: str, where: str) -> str:
    """A card's path, which may not lead out of its folder."""
    if not isinstance(path, str) or PurePath(path).is_absolute() or ".." in PurePath(path).parts or "\0" in path:
        raise UserError(f"{where}: {CARD}: {str(path)[:80]!r} of {name} is no path inside the folder")
    return path.removeprefix("./")


def _matching(base: Path, pattern: str, name: str, where: str) -> Iterator[Path]:
    pattern = _inside(pattern, name, where)
    if (base / pattern).is_dir():
        pattern = f"{pattern.rstrip('/')}/**"
    if PurePath(pattern).name == "**":  # to pathlib, folders only
        pattern = f"{pattern}/*"
    try:
        found = [file for file in itertools.islice(base.glob(pattern), _MOST_FILES) if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{where}: {CARD}: {pattern[:80]!r} of {name} is no pattern: {error}") from error
    for file in found:
        relative = file.relative_to(base)
        if file.name == CARD or any(part.startswith(".") for part in relative.parts):
            continue
        if not is_data_file(file.name):
            raise UserError(f"{where}: {relative}, which its {CARD} names, is not one of {', '.join(SUFFIXES)}")
        yield file


def _of_names(folder: Path, where: str) -> Splits:
    files = _data_files(folder, where)
    if not files:
        raise UserError(f"{where}: the folder has no {', '.join(SUFFIXES)} file")
    splits: Splits = {}
    unnamed = []
    for file in files:
        try:
            split = split_of(file.relative_to(folder))
        except ValueError as error:
            raise UserError(f"{where}: {error}: rename it") from None
        if split is None:
            unnamed.append(file.relative_to(folder))
        else:
            splits.setdefault(split, []).append(file)
    if not splits:
        return {TRAIN: files}
    besides = [file for file in unnamed if not _has_sibling(file, folder, splits)]
    for file in besides:
        tell_once(f"{folder}: {file} is in no split and is not read")
    if unnamed := [file for file in unnamed if file not in besides]:
        raise UserError(
            f"{where}: {unnamed[0]} is in no split, as other files are: name it train…, test…, eval…, valid…, dev…, "
            "or move it away"
        )
    if all(is_held_out(name) for name in splits):
        raise UserError(
            f"{where}: {next(iter(splits.values()))[0].relative_to(folder)} is held out, and there is nothing to "
            f"train on: name a file {TRAIN}…, or give --dataset_name the file itself"
        )
    return {name: splits[name] for name in sorted(splits, key=lambda name: (is_held_out(name), name))}


def _has_sibling(file: Path, folder: Path, splits: Splits) -> bool:
    """Whether a file that names no split stands beside one that does, and might belong to that split."""
    return any((folder / file).parent == other.parent for files in splits.values() for other in files)


def _data_files(folder: Path, where: str) -> list[Path]:
    """All data files below a folder, in order."""
    files: list[Path] = []
    seen = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        seen += len(names)
        if seen > _MOST_FILES:
            raise UserError(f"{where}: holds more than {_MOST_FILES:,} files: name the folder of the data in it")
        wanted = (name for name in names if not name.startswith(".") and name not in _RECORDS and is_data_file(name))
        files += [file for name in wanted if (file := Path(place, name)).is_file()]
    return sorted(files)


def read_saved(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of one split that `save_to_disk` wrote, numbered from 1.

    Raises:
        UserError: it cannot be read.
    """
    import datasets

    try:
        for file in json.loads((folder / _SAVED).read_text(encoding="utf-8"))["_data_files"]:
            if file["filename"] != PurePath(file["filename"]).name:
                raise ValueError(f"{_SAVED} names {file['filename']!r}, which is not in it")
        data = datasets.load_from_disk(str(folder))
        for number, row in enumerate(data, 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is {kind_of(row)}")
            yield number, row
    except Exception as error:  # pyarrow's and the library's own kinds
        raise UserError(f"{folder}: cannot be read as a folder of save_to_disk: {error}") from error
