"""Where preference rows come from: a file, a folder or the Hub; split, converted and checked row by row."""

import csv
import gzip
import io
import json
import random
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandem.data.formats import Row, RowError, choose_format, prompt_id, to_canonical
from tandem.data.options import DataOptions
from tandem.errors import UserError

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")


def load_pairs(options: DataOptions, split: str) -> list[Row]:
    """Canonical rows of one split of `options.dataset_name`.

    `split` is a split's name with an optional slice (`train[:5%]`). A local file is all `train`; a folder's files
    belong to the split their names begin with, or all to `train`.

    Raises:
        UserError: naming file, row and field of the first bad row beyond `options.max_bad_rows`.
    """
    located = _read_split(options, split)
    if not located:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows")
    located = [(place, _rename(place, row, options.keys)) for place, row in located]
    data_format = options.data_format or choose_format(located)
    _refuse_unused_keys(options, data_format)
    pairs: list[Row] = []
    bad: list[str] = []
    for place, row in located:
        try:
            pair = to_canonical(row, data_format)
        except RowError as error:
            bad.append(f"{place}: {error}")
            if len(bad) > options.max_bad_rows:
                count = f" (row {len(bad)} of this kind; --max_bad_rows {options.max_bad_rows})" if len(bad) > 1 else ""
                raise UserError(bad[-1] + count) from error
            continue
        source, _, number = place.rpartition(" row ")
        pairs.append({**pair, "source": source, "row": int(number)})
    for line in bad:
        print(f"skipped {line}", file=sys.stderr)
    return pairs


def load_splits(options: DataOptions) -> tuple[list[Row], list[Row]]:
    """Training and held-out pairs; no prompt is in both.

    With `val_ratio` the held-out pairs are drawn from the training split, whole prompts at a time; without it they
    are the test split's (none where a local source has no such split).
    """
    train = load_pairs(options, options.dataset_train_split)
    if options.val_ratio:
        return split_by_prompt(train, options.val_ratio, options.data_seed)
    if is_local(options.dataset_name) and _base(options.dataset_test_split) not in local_splits(options.dataset_name):
        return train, []
    return train, load_pairs(options, options.dataset_test_split)


def load_training(options: DataOptions) -> list[Row]:
    """The training pairs of `load_splits`, without reading a test split that nobody asked for."""
    return load_splits(options)[0] if options.val_ratio else load_pairs(options, options.dataset_train_split)


def load_held_out(options: DataOptions) -> list[Row]:
    """The held-out pairs of `load_splits`, for the stages that only measure.

    A local file or folder without a test split is measured whole, and a line on stderr says so.
    """
    if options.val_ratio:
        return load_splits(options)[1]
    if is_local(options.dataset_name) and _base(options.dataset_test_split) not in local_splits(options.dataset_name):
        print(f"{options.dataset_name} has no {options.dataset_test_split} split: using all of it", file=sys.stderr)
        return load_pairs(options, options.dataset_train_split)
    return load_pairs(options, options.dataset_test_split)


def split_by_prompt(pairs: list[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out `ratio` of the distinct prompts (at least one), with all their pairs."""
    prompts = sorted({prompt_id(pair["prompt"]) for pair in pairs})
    if len(prompts) < 2:
        raise UserError("--val_ratio: the data has only one prompt, so nothing can be held out")
    count = min(len(prompts) - 1, max(1, round(ratio * len(prompts))))
    held_out = set(random.Random(seed).sample(prompts, count))
    by_side: tuple[list[Row], list[Row]] = ([], [])
    for pair in pairs:
        by_side[prompt_id(pair["prompt"]) in held_out].append(pair)
    return by_side


def _rename(place: str, row: Row, keys: dict[str, str]) -> Row:
    for key in keys.values():
        if key not in row:
            raise UserError(f"{place}: no column {key!r}, named by a --…_key option (has {', '.join(map(str, row))})")
    return {**row, **{name: row[key] for name, key in keys.items()}}


def _refuse_unused_keys(options: DataOptions, data_format: str) -> None:
    for name, formats in {"input_key": ("alpaca",), "system_key": ("alpaca", "orca", "sharegpt")}.items():
        if getattr(options, name) and data_format not in formats:
            raise UserError(
                f"--{name} has no effect with the format {data_format}; "
                f"force one that has this column with --data_format ({', '.join(formats)})"
            )


def _base(split: str) -> str:
    return split.split("[")[0]


def is_local(name: str) -> bool:
    """Whether `name` means a path here rather than a Hub name: it exists, or could not be a Hub name."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.endswith(_SUFFIXES)


def local_splits(name: str) -> dict[str, list[Path]]:
    """The data files of a path, by split."""
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"--dataset_name {name}: no such file or folder")
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"--dataset_name {name}: not one of {', '.join(_SUFFIXES)}")
        return {"train": [path]}
    files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    if not files:
        raise UserError(f"--dataset_name {name}: the folder has no {', '.join(_SUFFIXES)} file")
    named = {
        split: [file for file in files if file.name.lower().startswith(prefixes)]
        for split, prefixes in {"train": ("train",), "test": ("test", "eval", "valid", "dev")}.items()
    }
    if not named["train"]:
        return {"train": files}
    return {split: members for split, members in named.items() if members}


def _read_split(options: DataOptions, split: str) -> list[tuple[str, Row]]:
    if not is_local(options.dataset_name):
        return _read_hub(options, split)
    splits = local_splits(options.dataset_name)
    if _base(split) not in splits:
        known = ", ".join(splits)
        raise UserError(
            f"--dataset_name {options.dataset_name}: no split {_base(split)} (has {known}); see --val_ratio"
        )
    located = [
        (f"{file} row {number}", row) for file in splits[_base(split)] for number, row in enumerate(read_rows(file), 1)
    ]
    return _slice(located, split)


def _slice(located: list[tuple[str, Row]], split: str) -> list[tuple[str, Row]]:
    if "[" not in split:
        return located
    from datasets import ReadInstruction

    base = _base(split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: len(located)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split}: {error}") from error
    return [item for part in parts for item in located[part.from_ : part.to]]


def _read_hub(options: DataOptions, split: str) -> list[tuple[str, Row]]:
    import datasets

    try:
        dataset = datasets.load_dataset(
            options.dataset_name, options.dataset_config, split=split, revision=options.dataset_revision
        )
    except Exception as error:  # the library raises a dozen kinds: not found, no access, no network, bad split, …
        raise UserError(f"--dataset_name {options.dataset_name} (split {split}): {error}") from error
    return [(f"{options.dataset_name} {split} row {number}", dict(row)) for number, row in enumerate(dataset, 1)]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one local file.

    Raises:
        UserError: naming the file and the row or line that cannot be read.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _read_parquet(path)
            return
        text = _read_text(path)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from error
    if path.name.endswith(".csv"):
        yield from _read_csv(path, text)
    elif ".jsonl" in path.name or not text.lstrip().startswith("["):
        yield from _read_jsonl(path, text)
    else:
        yield from _read_json(path, text)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = gzip.decompress(data)
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise UserError(f"{path}: has NUL bytes, so it is not a text file")
    return text


def _read_json(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _mapping(row, f"{path} row {number}")


def _read_jsonl(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): a JSON string may hold U+2028, which that method takes for the end of a line
    lines: Iterable[str] = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number}: not JSON: {error}") from error
        yield _mapping(row, f"{path} row {number}")


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be an object with columns, not {type(row).__name__}")
    return row


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # Not splitlines(): a field may hold U+2028, which that method takes for the end of a line
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: column {twice!r} appears twice")
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise UserError(f"{path} row {number}: has another number of fields than the header")
            yield row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not parquet: {error}") from error
