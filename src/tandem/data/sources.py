"""Where preference pairs come from: a file, a folder, the Hub or a mixture; split, converted and checked row by row."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tandem.data.balance import Balance
from tandem.data.columns import arrange, with_line_feeds
from tandem.data.files import SUFFIXES, read_rows
from tandem.data.formats import FORMATS, Row, RowError, check_format, choose_format, prompt_id, to_canonical
from tandem.data.mixtures import Source, mix, sources_of
from tandem.data.options import DataOptions
from tandem.data.rows import columns_of
from tandem.errors import UserError, one_line
from tandem.ranks import is_first

_SPLIT_PREFIXES = {"train": ("train",), "test": ("test", "eval", "valid", "dev")}

_CRLF = "line ends of Windows (CRLF) made line feeds"

Located = tuple[str, int, Row | RowError]  # source, row number, row or what is wrong with it


def load_pairs(
    options: DataOptions, split: str, skipped: list[str] | None = None, balances: list[Balance] | None = None
) -> list[Row]:
    """Canonical rows of one split of `options.dataset_name`, which is no mixture.

    `split` is a split's name with an optional slice (`train[:5%]`). A local file is all `train`; a folder's files
    belong to the split their names begin with, or all to `train`. Rows left out as `options.max_bad_rows` allows are
    told on stderr, and added to `skipped`; so is what no format reads, as a `Balance`, to `balances`.

    Raises:
        UserError: naming file, row and field of the first bad row beyond `options.max_bad_rows`.
    """
    located = list(read_split(options, split))
    if not located:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows")
    bad: list[str] = []
    located = [row for row in located if _good(row, options.max_bad_rows, bad)]
    if not located:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    balance = Balance(f"{options.dataset_name} ({split})")
    rows = []
    for source, number, row in located:
        try:
            rows.append((source, number, _arranged(source, number, row, options, balance)))
        except RowError as error:
            _good((source, number, error), options.max_bad_rows, bad)
    if not rows:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    data_format, example = options.data_format, ""
    if data_format is None:
        data_format, example = choose_format((_place(source, number), row) for source, number, row in rows)
    _refuse_unused_keys(options, data_format)
    pairs = []
    for source, number, row in rows:
        try:
            if example:
                check_format(row, data_format, example)
            pair = to_canonical(row, data_format, balance)
            pairs.append({**pair, "source": source, "row": number, "format": data_format})
        except RowError as error:
            _good((source, number, error), options.max_bad_rows, bad)
    for line in bad:
        print(f"skipped {one_line(line)}", file=sys.stderr)
    if skipped is not None:
        skipped += bad
    if not pairs:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    if balances is not None:
        balances.append(balance)
    if (balance.unread or balance.changed) and is_first():
        print(one_line(str(balance)), file=sys.stderr)
    return pairs


def _good(located: Located, max_bad_rows: int, bad: list[str]) -> bool:
    """Whether a row could be read; what is wrong with it goes to `bad`.

    Raises:
        UserError: one bad row too many.
    """
    source, number, row = located
    if not isinstance(row, RowError):
        return True
    bad.append(f"{_place(source, number)}: {row}")
    if len(bad) > max_bad_rows:
        count = f" (bad row {len(bad)}; --max_bad_rows {max_bad_rows})" if len(bad) > 1 else ""
        raise UserError(bad[-1] + count)
    return False


def _place(source: str, number: int) -> str:
    return f"{source} row {number}"


def load_splits(
    options: DataOptions, skipped: list[str] | None = None, balances: list[Balance] | None = None
) -> tuple[list[Row], list[Row]]:
    """Training and held-out pairs; with `val_ratio` no prompt is in both.

    With `val_ratio` the held-out pairs are drawn from the training split, whole prompts at a time and from each source
    of a mixture; without it they are the test split's (none where a local source has no such split). Weights of a
    mixture are of its training pairs; all its held-out pairs are kept.
    """
    sources = sources_of(options)
    if options.val_ratio:
        halves = [_halves(source.options, skipped, balances) for source in sources]
        held_out = [pair for _, half in halves for pair in half]
        # A prompt that one source holds out may be another's training prompt
        prompts = {prompt_id(pair["prompt"]) for pair in held_out}
        parts = [[pair for pair in train if prompt_id(pair["prompt"]) not in prompts] for train, _ in halves]
    else:
        given = [source.options for source in sources]
        parts = [load_pairs(each, each.dataset_train_split, skipped, balances) for each in given]
        held_out = [pair for source in sources for pair in _test_split(source.options, skipped, balances)]
    return mix(sources, parts, options.data_seed), _shuffled(held_out, sources, options.data_seed)


def load_training(options: DataOptions) -> list[Row]:
    """The training pairs of `load_splits`, without reading a test split that nobody asked for."""
    if options.val_ratio:
        return load_splits(options)[0]
    sources = sources_of(options)
    parts = [load_pairs(source.options, source.options.dataset_train_split) for source in sources]
    return mix(sources, parts, options.data_seed)


def load_held_out(options: DataOptions) -> list[Row]:
    """The held-out pairs of `load_splits`, for the stages that only measure.

    Where no source has a test split, all are measured whole, and a line on stderr says so.
    """
    if options.val_ratio:
        return load_splits(options)[1]
    sources = sources_of(options)
    pairs = [pair for source in sources for pair in _test_split(source.options)]
    if not pairs:
        print(f"{options.dataset_name} has no {options.dataset_test_split} split: using all of it", file=sys.stderr)
        parts = (load_pairs(source.options, source.options.dataset_train_split) for source in sources)
        pairs = [pair for part in parts for pair in part]
    return _shuffled(pairs, sources, options.data_seed)


def may_hold_out(options: DataOptions) -> bool:
    """Whether `load_splits` can have held-out pairs, as far as file names tell; a Hub name may always.

    Raises:
        UserError: no such file or folder.
    """
    return bool(options.val_ratio) or any(
        not is_local(source.options.dataset_name)
        or _base(source.options.dataset_test_split) in local_splits(source.options.dataset_name)
        for source in sources_of(options)
    )


def _halves(
    options: DataOptions, skipped: list[str] | None, balances: list[Balance] | None
) -> tuple[list[Row], list[Row]]:
    pairs = load_pairs(options, options.dataset_train_split, skipped, balances)
    return split_by_prompt(pairs, options.val_ratio, options.data_seed)


def _test_split(
    options: DataOptions, skipped: list[str] | None = None, balances: list[Balance] | None = None
) -> list[Row]:
    """Pairs of the test split; none where a local source has no such split."""
    name, split = options.dataset_name, options.dataset_test_split
    if is_local(name) and _base(split) not in local_splits(name):
        return []
    return load_pairs(options, split, skipped, balances)


def _shuffled(pairs: list[Row], sources: Sequence[Source], seed: int) -> list[Row]:
    """Pairs of a mixture in an order in which the first N are of all sources."""
    return random.Random(seed).sample(pairs, len(pairs)) if len(sources) > 1 else pairs


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


def _arranged(source: str, number: int, row: Any, options: DataOptions, balance: Balance) -> Row:
    """`row` under the names that formats know; what the options leave out of it goes to `balance`."""
    for key in options.keys.values():
        if key not in row:
            place = _place(source, number)
            raise UserError(f"{place}: no column {key!r}, named by a --…_key option (has {columns_of(row)})")
    tidy = with_line_feeds(row)
    if tidy != row:
        balance.changed[_CRLF] = balance.changed.get(_CRLF, 0) + 1
    arranged, aside = arrange(tidy, options.keys, options.data_format, options.ignore_columns)
    for name, (value, why) in aside.items():
        balance.set_aside(name, value, why)
    return arranged


def _refuse_unused_keys(options: DataOptions, data_format: str) -> None:
    used = {
        "prompt_key": ("prompt_pair", "messages") if options.data_format is None else _all_but("hh"),
        "input_key": ("alpaca", "prompt_pair", "orca", "messages"),
        "system_key": FORMATS,
    }
    for name, formats in used.items():
        if getattr(options, name) and data_format not in formats:
            raise UserError(
                f"--{name} has no effect with the format {data_format}; "
                f"force one that has this column with --data_format ({', '.join(formats)})"
            )


def _all_but(name: str) -> tuple[str, ...]:
    return tuple(known for known in FORMATS if known != name)


def _base(split: str) -> str:
    return split.split("[")[0]


def is_local(name: str) -> bool:
    """Whether `name` means a path here rather than a Hub name: it exists, or could not be a Hub name."""
    return name.startswith((".", "/", "~")) or name.endswith(SUFFIXES) or Path(name).exists()


def local_splits(name: str) -> dict[str, list[Path]]:
    """The data files of a path, by split."""
    try:
        return _local_splits(name, Path(name).expanduser())
    except (OSError, RuntimeError) as error:  # of a name too long, no permission, or the ~ of nobody
        raise UserError(f"--dataset_name {name}: {getattr(error, 'strerror', None) or error}") from error


def _local_splits(name: str, path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"--dataset_name {name}: not one of {', '.join(SUFFIXES)}")
        return {"train": [path]}
    if not path.is_dir():
        raise UserError(
            f"--dataset_name {name}: " + ("not a file or folder" if path.exists() else "no such file or folder")
        )
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"--dataset_name {name}: the folder has no {', '.join(SUFFIXES)} file")
    splits = {
        split: [file for file in files if file.name.lower().startswith(prefixes)]
        for split, prefixes in _SPLIT_PREFIXES.items()
    }
    if not splits["train"]:
        return {"train": files}
    left_out = sorted(set(files).difference(*splits.values()))
    if left_out:
        raise UserError(
            f"--dataset_name {name}: {left_out[0].name} is in no split, as other files are: "
            f"name it train…, {'…, '.join(_SPLIT_PREFIXES['test'])}…, or move it away"
        )
    return {split: members for split, members in splits.items() if members}


def read_split(options: DataOptions, split: str) -> Iterable[Located]:
    """The rows of a split as they are, each with its source and number, whatever they are about.

    Raises:
        UserError: no such data or split.
    """
    if not is_local(options.dataset_name):
        return _read_hub(options, split)
    for name in ("dataset_config", "dataset_revision"):
        if getattr(options, name):
            raise UserError(f"--{name} has no effect: {options.dataset_name} is here, not on the Hub")
    splits = local_splits(options.dataset_name)
    if _base(split) not in splits:
        known = ", ".join(splits)
        raise UserError(
            f"--dataset_name {options.dataset_name}: no split {_base(split)} (has {known}); see --val_ratio"
        )
    located = [(str(file), number, row) for file in splits[_base(split)] for number, row in read_rows(file)]
    return _slice(located, split)


def _slice(located: list[Located], split: str) -> list[Located]:
    if "[" not in split:
        return located
    from datasets import ReadInstruction

    base = _base(split)
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({base: len(located)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split}: {error}") from error
    return [item for part in parts for item in located[part.from_ : part.to]]


def _read_hub(options: DataOptions, split: str) -> Iterator[Located]:
    import datasets

    try:
        dataset = datasets.load_dataset(
            options.dataset_name, options.dataset_config, split=split, revision=options.dataset_revision
        )
    except Exception as error:  # the library raises a dozen kinds: not found, no access, no network, bad split, …
        raise UserError(f"--dataset_name {options.dataset_name} (split {split}): {error}") from error
    for number, row in enumerate(dataset, 1):
        yield f"{options.dataset_name} {split}", number, dict(row)
