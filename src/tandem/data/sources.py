"""Where preference pairs come from: a file, a folder, the Hub or a mixture; split, converted and checked row by row."""

import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from tandem.data.balance import Balance
from tandem.data.columns import arrange, with_line_feeds
from tandem.data.examples import Example, read_example
from tandem.data.formats import (
    FORMATS,
    TEXT,
    Row,
    RowError,
    as_messages,
    check_format,
    choose_format,
    prompt_id,
    to_canonical,
)
from tandem.data.mixtures import Source, mix, sources_of
from tandem.data.options import ALL, DataOptions, SFTDataOptions
from tandem.data.rated import paired
from tandem.data.repeated import without_prompts
from tandem.data.rows import columns_of, given_up
from tandem.data.scores import scores_of
from tandem.data.several import as_rows, flat, numbers_of, one_by_one, refuse_some, unweighed
from tandem.data.shapes import known_names, known_shape
from tandem.data.splits import Located, has_test_split, is_local, local_splits, read_split
from tandem.errors import UserError
from tandem.objects import load_object
from tandem.ranks import tell, tell_once

_CRLF = "line ends of Windows (CRLF) made line feeds"


def load_pairs(
    options: DataOptions, split: str, skipped: list[str] | None = None, balances: list[Balance] | None = None
) -> list[Row]:
    """Canonical rows of one split of `options.dataset_name`, which is no mixture.

    `split` is a split's name with an optional slice (`train[:5%]`). A local file is all `train`; a folder's files
    belong to the splits that `data.layout` finds, or all to `train`. Rows left out as `options.max_bad_rows` allows are
    told on stderr, and added to `skipped`; so is what no format reads, as a `Balance`, to `balances`.

    Raises:
        UserError: naming file, row and field of the first bad row beyond `options.max_bad_rows`.
    """
    bad: list[str] = []
    balance = Balance(f"{options.dataset_name} ({split})")
    rows = []
    for source, number, row in given_up(_located(options, split, bad)):
        try:
            rows += [(source, number, read) for read in _read(arranged(source, number, row, options, balance), options)]
        except RowError as error:
            _good((source, number, error), options.max_bad_rows, bad)
    if not rows:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    data_format, first = options.data_format, ""
    if all(read.kind == "text" for _, _, read in rows):
        data_format = TEXT
    elif data_format is None:
        data_format, first = choose_format((_place(source, number), read.row) for source, number, read in rows)
    _refuse_unused_keys(options, data_format)
    columns = {read.column for _, _, read in rows if read.kind is not None}
    pairs = []
    for source, number, read in given_up(rows):
        try:
            pair = _pair_of(read, data_format, first, options, balance)
            place = {"source": source, "row": number, "format": data_format}
            pairs.append({**pair, **place, **({"group": _place(source, number)} if read.among else {})})
        except RowError as error:
            _good((source, number, read.in_its_words(error)), options.max_bad_rows, bad)

    def refuse(pair: Row, error: RowError) -> None:
        _good((pair["source"], pair["row"], error), options.max_bad_rows, bad)

    pairs = refuse_some(without_prompts(pairs, balance, refuse), refuse)
    if columns:
        balance.read = columns | balance.read - {"chosen", "rejected", *(["prompt"] if data_format == TEXT else [])}
    for line in bad:
        tell(f"skipped {line}")
    if skipped is not None:
        skipped += bad
    if not pairs:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    pairs = _far_apart(options, split, pairs)
    if balances is not None:
        balances.append(balance)
    balance.tell()
    return pairs


def _located(options: DataOptions, split: str, bad: list[str]) -> list[Located]:
    """The raw rows of a split that could be read, rated ones as pairs; what is wrong with others goes to `bad`."""
    located = paired(read_split(options, split), options, split)
    if not located:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows")
    good = [row for row in located if _good(row, options.max_bad_rows, bad)]
    if not good:
        raise UserError(f"--dataset_name {options.dataset_name}: split {split} has no rows but bad ones; {bad[0]}")
    return good


def _read(row: Row, options: DataOptions) -> list[Example]:
    """What a row has to train on: an example, a pair, or as many pairs as it has rejected answers.

    Raises:
        RowError: none of these.
    """
    rows = one_by_one(row)
    if isinstance(options, SFTDataOptions):  # which learns the chosen answer, once
        read = [read_example(rows[0], options)]
    else:
        read = [Example(each, among=f", answer {place}" if len(rows) > 1 else "") for place, each in enumerate(rows, 1)]
    return [dataclasses.replace(each, row=known_shape(each.row, options.data_format)) for each in read]


def _pair_of(read: Example, data_format: str, first: str, options: DataOptions, balance: Balance) -> Row:
    """The canonical row, with its scores and, of an example without a rejected answer, its kind.

    `first` is the place of the row that the format was found by, empty where the user named it.
    """
    if (read.kind == "text") != (data_format == TEXT):
        raise RowError("a source is of texts alone, or of rows that have an answer; this row is the other kind")
    if first:
        check_format(read.row, data_format, first)
    scores, of_scores = scores_of(read.row, needed=options.min_score_margin is not None)
    numbers = {} if isinstance(options, SFTDataOptions) else numbers_of(read.row)
    row = {name: read.row[name] for name in read.row if name not in (*of_scores, *numbers)}
    pair = to_canonical(row, data_format, balance)
    balance.read.update(of_scores, numbers)
    return {**pair, **scores, **numbers, **({"kind": read.kind} if read.kind is not None else {})}


def _far_apart(options: DataOptions, split: str, pairs: list[Row]) -> list[Row]:
    """The pairs whose scores are further apart than --min_score_margin.

    Raises:
        UserError: none of them.
    """
    margin = options.min_score_margin
    if margin is None:
        return pairs
    kept = [pair for pair in pairs if pair["scores"][0] - pair["scores"][1] > margin]
    where = f"{options.dataset_name} ({split})"
    if not kept:
        raise UserError(f"--min_score_margin {margin:g}: no pair of {where} has its scores that far apart")
    if len(kept) < len(pairs):
        tell_once(
            f"{where}: {len(pairs) - len(kept)} of {len(pairs)} pairs are left out by --min_score_margin {margin:g}"
        )
    return kept


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
    of a mixture, or with `val_ratio_of` from each that has no held-out split; without it they are the test split's
    (none where a local source has no such split). Weights of a mixture are of its training pairs; all its held-out
    pairs are kept.
    """
    sources = [dataclasses.replace(source, options=of_own_split(source.options)) for source in sources_of(options)]
    drawn: list[list[Row] | None] = []
    parts = []
    for source in sources:
        pairs = load_pairs(source.options, source.options.dataset_train_split, skipped, balances)
        train, half = _halved(pairs, source.options) if source.options.val_ratio else (pairs, None)
        parts.append(train)
        drawn.append(half)
    held_out: list[Row] = []
    for source, half in zip(sources, drawn, strict=True):
        held_out += _test_split(source.options, skipped, balances) if half is None else half
    if options.val_ratio:  # a prompt that one source holds out may be another's training prompt
        prompts = {_asked(pair) for pair in held_out}
        parts = [[pair for pair in part if _asked(pair) not in prompts] for part in parts]
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
    return unweighed(held_out_of(options))


def of_set(options: DataOptions, name: str) -> DataOptions:
    """The options with other data: of the same format and keys, unless they are those of a mixture's sources."""
    kept = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    own = ("dataset_name", "dataset_config", "dataset_revision", "dataset_train_split", "dataset_test_split")
    kept = {name: value for name, value in kept.items() if name not in (*own, "val_ratio", "val_ratio_of", "data_seed")}
    return type(options)(dataset_name=name, **kept)


def held_out_of(options: DataOptions) -> list[Row]:
    """`load_held_out`, for training, which evaluates by weights and margins."""
    if options.val_ratio:
        return load_splits(options)[1]
    sources = sources_of(options)
    pairs = [pair for source in sources for pair in _test_split(source.options)]
    if not pairs:
        tell(f"{options.dataset_name} has no {options.dataset_test_split} split: using all of it")
        parts = (load_pairs(source.options, source.options.dataset_train_split) for source in sources)
        pairs = [pair for part in parts for pair in part]
    return _shuffled(pairs, sources, options.data_seed)


def check_sources(options: DataOptions) -> None:
    """Refuse sources that are named by a path where there is no data; nothing is read of the others.

    Raises:
        UserError: naming the first.
    """
    for source in sources_of(options):
        if is_local(source.options.dataset_name):
            local_splits(source.options.dataset_name, source.options.dataset_config)


def may_hold_out(options: DataOptions) -> bool:
    """Whether `load_splits` can have held-out pairs, as far as file names tell; a Hub name may always.

    Raises:
        UserError: no such file or folder.
    """
    return bool(options.val_ratio) or any(
        not is_local(source.options.dataset_name) or has_test_split(source.options) for source in sources_of(options)
    )


def all_hold_out(options: DataOptions) -> bool:
    """Whether every source has a held-out split of its own, as `hold_out` finds."""
    return all(hold_out(options))


def hold_out(options: DataOptions) -> list[bool]:
    """Of each source whether it has a held-out split of its own; asks the Hub for the names of splits.

    Raises:
        UserError: a source cannot be asked for, or has several splits that could be meant.
    """
    return [has_test_split(source.options) for source in sources_of(options)]


def of_own_split(options: DataOptions) -> DataOptions:
    """The options of one source, without `val_ratio` where `val_ratio_of` leaves it to the source's held-out split."""
    if not options.val_ratio or options.val_ratio_of == ALL or not has_test_split(options):
        return options
    own = copy.copy(options)  # not `replace`, which would refuse options that have an effect on other sources only
    own.val_ratio, own.val_ratio_of = 0.0, ALL
    return own


def _halved(pairs: list[Row], options: DataOptions) -> tuple[list[Row], list[Row]]:
    return split_by_prompt(pairs, options.val_ratio, options.data_seed)


def _test_split(
    options: DataOptions, skipped: list[str] | None = None, balances: list[Balance] | None = None
) -> list[Row]:
    """Pairs of the test split; none where a source has no held-out split, and none was named."""
    try:
        return load_pairs(options, options.dataset_test_split, skipped, balances)
    except UserError:
        if has_test_split(options):
            raise
        return []


def _shuffled(pairs: list[Row], sources: Sequence[Source], seed: int) -> list[Row]:
    """Pairs of a mixture in an order in which the first N are of all sources; those of a row stay together."""
    rows = as_rows(pairs)
    return flat(random.Random(seed).sample(rows, len(rows))) if len(sources) > 1 else pairs


def split_by_prompt(pairs: list[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out `ratio` of the distinct prompts (at least one), with all their pairs.

    Prompts that differ in white space alone, or in being text or messages, are one.
    """
    prompts = sorted({_asked(pair) for pair in pairs})
    if len(prompts) < 2:
        raise UserError("--val_ratio: the data has only one prompt, so nothing can be held out")
    count = min(len(prompts) - 1, max(1, round(ratio * len(prompts))))
    held_out = set(random.Random(seed).sample(prompts, count))
    by_side: tuple[list[Row], list[Row]] = ([], [])
    for pair in pairs:
        by_side[_asked(pair) in held_out].append(pair)
    return by_side


def _asked(pair: Row) -> str:
    """What is equal for prompts of which one may not be trained on while the other is held out."""
    turns = as_messages(pair["prompt"])
    return prompt_id([{**turn, "content": " ".join(str(turn.get("content", "")).split())} for turn in turns])


def arranged(source: str, number: int, row: Any, options: DataOptions, balance: Balance) -> Row:
    """`row` under the names that formats know; what the options leave out of it goes to `balance`.

    Raises:
        UserError: a column that a `--…_key` option names is not there.
        RowError: lists that Python's own notation wrote as text, or the user's function cannot read the row.
    """
    if options.row_function is not None:
        row = _made_by(options.row_function, row)
    row = known_names(row, options.keys)
    own = (options.completion_key, options.text_key) if isinstance(options, SFTDataOptions) else ()
    for key in (*options.keys.values(), *filter(None, own)):
        if key not in row:
            place = _place(source, number)
            raise UserError(f"{place}: no column {key!r}, named by a --…_key option (has {columns_of(row)})")
    tidy = with_line_feeds(row)
    if tidy != row:
        balance.changed[_CRLF] = balance.changed.get(_CRLF, 0) + 1
    named, aside = arrange(tidy, options.keys, options.data_format, options.ignore_columns)
    for name, (value, why) in aside.items():
        balance.set_aside(name, value, why)
    return named


def _made_by(name: str, row: Any) -> Row:
    """What the user's function `name` makes of a row."""
    function = _row_function(name)
    try:
        made = function(row)
    except Exception as error:  # whatever a user's function raises, this row is the one it could not read
        raise RowError(f"--row_function {name}: {type(error).__name__}: {error}") from error
    if not isinstance(made, dict):
        raise RowError(f"--row_function {name}: gave a {type(made).__name__}, not a row")
    return made


@functools.cache
def _row_function(name: str) -> Callable[[Any], Any]:
    function = load_object(name, "--row_function")
    if not callable(function):
        raise UserError(f"--row_function {name}: is a {type(function).__name__}, not a function")
    found: Callable[[Any], Any] = function
    return found


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
