"""Turns the rows of a data set into a memory-mapped set of token ids, made by all cores and kept by content.

For the same files, options, template, tokenizer and code the set is made once, and every process of every later start
finds it. Messages about the rows, printed when it was made, are printed again then.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from tandem.data.chunks import FEW, Workers, cores
from tandem.data.content import Content, code_content
from tandem.data.rendering import TemplateFault
from tandem.data.rows import Row, given_up
from tandem.data.token_cache import Build, TokenCache, Tokenized, mapped, unkept
from tandem.data.tokenized import MASKS, fill_masks, refuse_faults
from tandem.errors import UserError
from tandem.options.model import PreparationOptions
from tandem.ranks import Said, recorded, say_again
from tandem.runs import sha256_json

Made = dict[str, Any]
Read = Callable[[], dict[str, list[Row]]]
TRAIN = "train_dataset"
HELD_OUT = "eval_dataset"
_GIB = 2**30
_ROW_BYTES = 1_000  # of a small row in a file
_MOST_TRIES = 3


class Maker(Protocol):
    """Makes tokenized rows. It is sent to other processes."""

    what: str
    """What a row is called in messages: `pair`."""

    def settings(self) -> Any:
        """The options that the result depends on, as values of JSON."""

    def make(self, row: Row, counts: Counter[str]) -> Made | None:
        """The tokenized row, or None to leave it out. Counts in `counts` what `tell` reports.

        Raises:
            TemplateFault: the template refuses the row.
        """

    def tell(self, counts: Counter[str], total: int) -> None:
        """Report what was counted in `total` rows.

        Raises:
            UserError: no row is left.
        """


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows to tokenize.

    Attributes:
        read: reads them; gives the rows of each split by its name.
        content: describes what they are read from, without reading them as rows.
    """

    read: Read
    content: Callable[[], Content | None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared set.

    Attributes:
        tables: by split, memory-mapped: token ids as lists of int32.
        data: digest of the ids of the training pairs, of those that were left out too.
        tokens: `tokenized.token_hash` of all splits.
        is_new: whether it was made now.
    """

    tables: dict[str, pa.Table]
    data: str
    tokens: str
    is_new: bool


def prepare(rows: Rows, maker: Maker, settings: Any | None, options: PreparationOptions) -> Prepared:
    """The tokenized rows: those that were kept for the same content, else made now.

    Args:
        settings: all that the result depends on besides the rows and the code, as values of JSON; None if that cannot
            be described: then nothing is kept.

    Raises:
        UserError: rows that cannot be read, rendered or trained; a disk that is full.
    """
    for _ in range(_MOST_TRIES):
        content = rows.content()
        few = content is not None and content.size < FEW * _ROW_BYTES
        build = _building(rows.read, maker, options, few=few)
        if settings is None:
            return _told(unkept(build))
        if content is None:
            return _by_rows(rows, maker, settings, options)
        with contextlib.suppress(_Changed):
            return _told(_cached(options, [content.told, settings], _if_unchanged(build, rows, content)))
    raise UserError("the data changes while it is read: try again when its files are whole")


def _by_rows(rows: Rows, maker: Maker, settings: Any, options: PreparationOptions) -> Prepared:
    """For rows whose files are not known: they are read first, and serve as the content themselves."""
    said, found = _quietly(rows.read)
    say_again(said)
    few = sum(map(len, found.values())) <= FEW
    told = [[name, _ordered_digest(part)] for name, part in found.items()]
    return _told(_cached(options, [told, settings], _building(lambda: found, maker, options, few=few)))


def _ordered_digest(rows: list[Row]) -> str:
    """Not `sha256_json`, which ignores the order of keys: templates write tools and arguments in their own order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":"), default=repr).encode() + b"\n")
    return digest.hexdigest()


def _cached(options: PreparationOptions, content: Any, build: Build) -> Tokenized:
    cache = TokenCache(options.token_cache, int(options.token_cache_gib * _GIB))
    return cache.get(sha256_json([code_content(), content])[:32], build)


class _Changed(Exception):
    """The files have changed since their content was described."""


def _if_unchanged(build: Build, rows: Rows, content: Content) -> Build:
    def checked(folder: Path) -> Any:
        about = build(folder)
        if rows.content() != content:
            raise _Changed
        return about

    return checked


def _told(found: Tokenized) -> Prepared:
    about = found.about
    say_again([(how, line) for how, line in about["said"]])
    return Prepared(found.tables, about["data"], about["tokens"], found.is_new)


def _quietly(work: Callable[[], Any]) -> tuple[list[Said], Any]:
    """The messages that `work` would have printed, and its result. If it fails, the messages are printed first."""
    said: list[Said] = []
    try:
        with recorded() as said:
            return said, work()
    except BaseException:
        say_again(said)
        raise


def _building(read: Read, maker: Maker, options: PreparationOptions, *, few: bool = False) -> Build:
    """A builder that reads the rows and writes their tokens; one process does, if they are `few`, unless more are asked
    for."""

    def build(folder: Path) -> Any:
        with Workers(_Chunk(maker), options.dataset_num_proc or (1 if few else cores())) as workers:
            said, about = _quietly(lambda: _built(folder, read, maker, workers))
        return about | {"said": said}

    return build


def _built(folder: Path, read: Read, maker: Maker, workers: "Workers[Row, _Part]") -> dict[str, Any]:
    splits = read()
    data = sha256_json([row["pair_id"] for row in splits.get(TRAIN, [])])
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest = _write_split(folder / f"{name}.arrow", splits.pop(name), maker, workers, digest)
    return {"data": data, "tokens": digest.hexdigest()}


def _write_split(
    file: Path, rows: list[Row], maker: Maker, workers: "Workers[Row, _Part]", digest: "hashlib._Hash"
) -> "hashlib._Hash":
    """Write a split's tokens. Returns `digest` updated with them, as in `tokenized.token_hash`."""
    counts, faults, sizes, schemas, total = Counter[str](), list[str](), list[int](), list[pa.Schema](), len(rows)
    begun, head = digest.copy(), f"[{json.dumps(file.stem)},".encode()
    parts = file.with_suffix(".parts")
    with open(parts, "wb") as written:
        for part in workers.map(given_up(rows), total, f"tokens of {file.stem}"):
            counts += part.counts
            faults += part.faults
            sizes.append(written.write(part.table))
            schemas.append(pa.ipc.open_stream(part.table).schema)
            for lists in part.lists:
                digest.update(head + lists + b"]")
    refuse_faults(faults, total, f"{maker.what}s")
    maker.tell(counts, total)
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    with open(parts, "rb") as read, pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for size in sizes:
            table = pa.ipc.open_stream(read.read(size)).read_all()
            if len(table):
                writer.write_table(_as(schema, table))
    parts.unlink()
    if all(set(each.names) in (set(), set(schema.names)) for each in schemas):
        return digest
    # Some parts have columns that others lack, so that the rows are not what was hashed above
    for row in rows_of(mapped(file)):
        begun.update(head + _values(row) + b"]")
    return begun


def _as(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """A part's table with all columns of `schema`: masks that it lacks are all 1, other columns null."""
    columns = {}
    for field in schema:
        name = field.name
        if name in table.column_names:
            columns[name] = table[name].cast(field.type)
        elif name in MASKS:
            ids = table[name.replace("mask", "ids")].combine_chunks()
            columns[name] = pa.ListArray.from_arrays(ids.offsets, pa.array(np.ones(len(ids.values), np.int32)))
        else:
            columns[name] = pa.nulls(len(table), field.type)
    return pa.table(columns, schema=schema)


def rows_of(table: pa.Table) -> Iterator[Made]:
    """The rows of a table, without the columns that are null in them."""
    for batch in table.to_batches():
        for row in batch.to_pylist():
            yield {name: value for name, value in row.items() if value is not None}


@dataclasses.dataclass
class _Part:
    """A chunk's tokenized rows as an Arrow stream, the JSON of each row's lists and numbers, counts and faults."""

    table: bytes
    lists: list[bytes]
    counts: Counter[str]
    faults: list[str]


@dataclasses.dataclass
class _Chunk:
    maker: Maker

    def __call__(self, rows: Sequence[Row]) -> _Part:
        made, counts, faults = [], Counter[str](), []
        for row in rows:
            try:
                one = self.maker.make(row, counts)
            except TemplateFault as fault:
                faults.append(f"{row['source']} row {row['row']}: {fault}" if "source" in row else str(fault))
                continue
            if one is not None:
                made.append(one)
        fill_masks(made)
        table = table_of(made)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return _Part(sink.getvalue().to_pybytes(), [_values(row) for row in made], counts, faults)


def table_of(rows: Sequence[Made]) -> pa.Table:
    """Tokenized rows as a table. Lists of numbers become lists of int32; a column that a row lacks is null in it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Sequence[Any]) -> pa.Array:
    first = next((value for value in values if value), None)
    if isinstance(first, list) and isinstance(first[0], int):
        return pa.array(values, pa.list_(pa.int32()))
    return pa.array(values)


def _values(row: Made) -> bytes:
    values = [(name, row[name]) for name in sorted(row) if isinstance(row[name], list | float | int)]
    return json.dumps(values, separators=(",", ":")).encode()
