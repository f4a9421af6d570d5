"""The rows of one file of preference pairs, read strictly and a row at a time."""

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from tandem.data.formats import Row, RowError, kind_of
from tandem.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
_SYNONYMS = (".ndjson", ".ndjson.gz")  # of .jsonl
# The only bound on what a .gz unpacks to
LONGEST_LINE = 2**28  # bytes
LARGEST_DOCUMENT = 2**31  # bytes of a .json file, which is read whole

NumberedRow = tuple[int, Row | RowError]

_SPACE = re.compile(r"[ \t\r\n]*")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what the error handler surrogateescape makes of a byte
_NUL = re.compile("\0")
_READING_ERRORS = (OSError, EOFError, zlib.error)


def is_data_file(name: str) -> bool:
    """Whether a file of this name is read, in whatever case its ending is written."""
    return name.lower().endswith(SUFFIXES + _SYNONYMS)


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of a file with their numbers: from 1, in .jsonl those of the lines.

    A row that cannot be read, where the others still can, is replaced by the fault.

    Raises:
        UserError: naming the file and the row or line from which on nothing can be read.
    """
    name = path.name.lower().removesuffix(".gz")
    read = {".parquet": _read_parquet, ".csv": _read_csv, ".json": _read_json}.get(Path(name).suffix, _read_jsonl)
    try:
        yield from read(path)
    except _READING_ERRORS as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
        start = file.peek(2)[:2]
        if start == b"\x1f\x8b":
            raise UserError(f"{path}: is packed with gzip; let its name end in .gz")
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8")
        yield file


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Split at newlines only: a JSON string may hold U+2028, which str.splitlines() takes for the end of a line
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path} row {number}: is longer than {LONGEST_LINE:,} bytes; is it a row a line?")
            yield number, line


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    parser = _RowParser()
    for number, line in _lines(path):
        if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            raise UserError(f"{path} row 1: begins a list, but .jsonl has an object a line; rename the file to .json")
        if line.strip(b" \t\r\n"):
            yield number, parser.line(line)


def _read_json(path: Path) -> Iterator[NumberedRow]:
    with _open(path) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if len(data) > LARGEST_DOCUMENT:
        raise UserError(f"{path}: is larger than {LARGEST_DOCUMENT:,} bytes; make it .jsonl, an object a line")
    if b"\0" in data:
        raise UserError(f"{path}: has a NUL byte at {data.index(0) + 1}, so it is no text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: {_bad_byte(error)}") from error
    if not text.strip():
        return
    if text.lstrip()[0] == "[":
        yield from _RowParser().array(path, text)
        return
    row, end = _RowParser().first(text.strip())
    if end == len(text.strip()):
        yield 1, row  # one object, over any number of lines
    else:
        yield from _read_jsonl(path)


class _RowParser:
    """JSON → rows, or their faults, two equal keys among them: a plain parser would silently take the last."""

    def __init__(self) -> None:
        self._twice: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, items: list[tuple[str, Any]]) -> Row:
        row = dict(items)
        if len(row) < len(items):
            names = [name for name, _ in items]
            self._twice.append(next(name for name in names if names.count(name) > 1))
        return row

    def _decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        self._twice.clear()
        return self._decoder.raw_decode(text, start)

    def _checked(self, value: Any) -> Row | RowError:
        if not isinstance(value, dict):
            return RowError(f"must be an object with columns, not {kind_of(value)}")
        return RowError(f"field {self._twice[0][:40]!r}: is there twice") if self._twice else value

    def line(self, line: bytes) -> Row | RowError:
        """The row in one line."""
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            return RowError(f"{self._field_with(_UNDECODED, line)}{_bad_byte(error)}")
        if "\0" in text:
            return RowError(f"{self._field_with(_NUL, line)}has a NUL byte, which no text has")
        row, end = self.first(text)
        return row if end in (len(text), -1) else RowError(f"not JSON: {_near(text, end, 'a second value')}")

    def first(self, text: str) -> tuple[Row | RowError, int]:
        """The row that `text` begins with, and the index of its end; -1 where it cannot be found."""
        try:
            value, end = self._decode(text)
        except (ValueError, RecursionError) as error:
            return RowError(_not_json(text, error)), -1
        return self._checked(value), end

    def array(self, path: Path, text: str) -> Iterator[NumberedRow]:
        """The rows of `text`, which is one JSON array.

        Raises:
            UserError: naming the row from which on it is no JSON.
        """
        number, position = 0, _skip(text, text.index("[") + 1)
        more = text[position : position + 1] != "]"
        while more:
            number += 1
            place = f"{path} row {number}"
            try:
                value, position = self._decode(text, position)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: {_not_json(text, error)}") from error
            yield number, self._checked(value)
            position = _skip(text, position)
            more = text[position : position + 1] == ","
            if not more and text[position : position + 1] != "]":
                raise UserError(
                    f"{place}: not JSON: {_near(text, position, 'no comma and no end of the list after it')}"
                )
            position = _skip(text, position + 1) if more else position
        if text[position + 1 :].strip():
            raise UserError(f"{path}: not JSON: {_near(text, _skip(text, position + 1), 'more after the list')}")

    def _field_with(self, pattern: re.Pattern[str], line: bytes) -> str:
        """The beginning of a message about text that matches `pattern`, with the field it is in where that is known."""
        try:
            row = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), strict=False)
        except (ValueError, RecursionError):
            return ""
        fields = row.items() if isinstance(row, dict) else ()
        found = (name for name, value in fields if any(pattern.search(text) for text in _texts(value)))
        return f"field {name[:40]!r}: " if (name := next(found, None)) else ""


def _texts(value: Any) -> Iterator[str]:
    """Texts in a field: itself, or those of its messages."""
    for message in value if isinstance(value, list) else [value]:
        for text in message.values() if isinstance(message, dict) else [message]:
            if isinstance(text, str):
                yield text


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _not_json(text: str, error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {_near(text, error.pos, error.msg.removesuffix(' at'))}"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"


def _near(text: str, position: int, what: str) -> str:
    rest = text[position : position + 20].strip()
    return f"{what} at character {position + 1}, " + (f"near {rest!r}" if rest else "where the text ends")


def _bad_byte(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8; if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(sys.maxsize)
    number = 0
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
        try:
            _check_header(path, list(reader.fieldnames or []))
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    count = len(row.get(None) or []) + sum(value is not None for name, value in row.items() if name)
                    yield number, RowError(f"has {count} fields, the header {len(reader.fieldnames or [])}")
                else:
                    yield number, row
        except csv.Error as error:
            said = "a quoted field has no end" if "end of data" in str(error) else str(error)
            raise UserError(f"{path} row {number + 1}: not CSV: {said}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {_first_undecodable_line(path)}: {_bad_byte(error)}") from error


def _check_header(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: column {twice[:40]!r} appears twice in the header")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise UserError(f"{path}: the header {names[0][:40]!r} is one column: columns are separated by commas")


def _first_undecodable_line(path: Path) -> int:
    for number, line in _lines(path):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 1


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row
    except (FileNotFoundError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f"{path} row {number + 1}" if number else f"{path}"
        raise UserError(f"{where}: not parquet, or a damaged file: {error}") from error


def _batch_rows(batch: Any) -> Iterator[Row | RowError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # nothing was yielded: it converts the whole batch first
        for index in range(batch.num_rows):
            yield _decoded_row(batch.slice(index, 1))


def _decoded_row(batch: Any) -> Row | RowError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return RowError(f"field {name!r}: byte 0x{error.object[error.start]:02x} is not UTF-8")
    return row
