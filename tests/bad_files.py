"""Bad data files, each with the exact line that its user gets."""

import datetime
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import pyarrow.parquet

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
FORMATS = "hh, prompt_pair, alpaca, orca, messages, sharegpt"
SUFFIXES = ".json, .jsonl, .csv, .json.gz, .jsonl.gz, .csv.gz, .parquet"
HEADER = b"prompt,chosen,rejected\n"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@dataclass(frozen=True)
class Bad:
    """A file called `name`; `message` has {file} for its path, and goes on after a final …"""

    name: str
    content: bytes | Callable[[], bytes] = field(repr=False)
    message: str

    @property
    def data(self) -> bytes:
        return self.content() if callable(self.content) else self.content


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row(**changes: object) -> dict[str, object]:
    return GOOD | changes


def without(column: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key != column}


def hh(chosen: str, rejected: str) -> bytes:
    return lines({"chosen": chosen, "rejected": rejected})


def messages(**changes: object) -> bytes:
    return lines({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]} | changes)


def sharegpt(**changes: object) -> bytes:
    turns = {"conversations": [{"from": "human", "value": "q"}]}
    answers = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    return lines(turns | answers | changes)


def parquet(rows: list[dict[str, Any]], schema: pyarrow.Schema | None = None) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def parquet_with_latin1() -> bytes:
    table = pyarrow.table({"prompt": [b"q", b"gr\xfcn"], "chosen": [b"a"] * 2, "rejected": [b"b"] * 2})
    columns = [column.combine_chunks() for column in table.columns]
    texts = [pyarrow.StringArray.from_buffers(2, column.buffers()[1], column.buffers()[2]) for column in columns]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(texts, names=table.column_names), sink)
    return sink.getvalue()


PACKED = gzip.compress(lines(*[row(prompt=str(index)) for index in range(500)]), mtime=0)
LATIN1 = "if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"
NO_FORMAT = (
    "no known preference format has the columns {columns}; name it with --data_format "
    f"({FORMATS}) and its columns with --prompt_key, --chosen_key, --rejected_key"
)
ONE_FORMAT = "a source has one format; put each into a file of its own and mix them (--help, --dataset_name)"
NO_ROWS = "--dataset_name {file}: split train has no rows"

BAD_FILES: dict[str, Bad] = {
    # Columns
    "no rejected": Bad(
        "a.jsonl", lines(without("rejected")), "{file} row 1: " + NO_FORMAT.format(columns="prompt, chosen")
    ),
    "no chosen later on": Bad(
        "a.jsonl",
        lines(GOOD, GOOD, without("chosen")),
        "{file} row 3: column 'chosen' is missing; columns are prompt, rejected",
    ),
    "no prompt later on": Bad(
        "a.jsonl",
        lines(GOOD, without("prompt")),
        "{file} row 2: column 'prompt' is missing; columns are chosen, rejected",
    ),
    "no prompt and no transcript": Bad(
        "a.jsonl",
        lines(without("prompt")),
        "{file} row 1: has no prompt: 'chosen' and 'rejected' are no transcripts ('Human: …'), and there is no other "
        "text column known; name it with --prompt_key (columns are chosen, rejected)",
    ),
    "other columns": Bad(
        "a.jsonl", lines({"text": "a", "label": 1}), "{file} row 1: " + NO_FORMAT.format(columns="text, label")
    ),
    "an empty object": Bad("a.jsonl", b"{}\n", "{file} row 1: " + NO_FORMAT.format(columns="none")),
    "a list in an object": Bad(
        "a.json", json.dumps({"data": [GOOD]}).encode(), "{file} row 1: " + NO_FORMAT.format(columns="data")
    ),
    "a thousand columns": Bad(
        "a.jsonl",
        lines({f"c{index:03}": index for index in range(1000)}),
        "{file} row 1: "
        + NO_FORMAT.format(columns=", ".join(f"c{index:03}" for index in range(12)) + ", and 988 more"),
    ),
    "a column name that clears the screen": Bad(
        "a.jsonl", lines({"\x1b[2J\n": 1}), "{file} row 1: " + NO_FORMAT.format(columns="\\x1b[2J ")
    ),
    "two formats": Bad(
        "a.jsonl",
        lines(GOOD, {"question": "q", "chosen": "a", "rejected": "b"}),
        "{file} row 2: looks like orca, but {file} row 1 looks like prompt_pair: " + ONE_FORMAT,
    ),
    "transcripts among pairs": Bad(
        "a.jsonl",
        lines({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}, GOOD, GOOD),
        "{file} row 1: looks like hh, but {file} row 2 looks like prompt_pair: " + ONE_FORMAT,
    ),
    "images": Bad(
        "a.jsonl",
        lines(row(images=["cat.png"])),
        "{file} row 1: field 'images': is not empty, and Tandem trains on text only",
    ),
    # Values
    "an empty completion": Bad(
        "a.jsonl", lines(GOOD, row(chosen="  ")), "{file} row 2: field 'chosen': the completion is empty"
    ),
    "an empty prompt": Bad("a.jsonl", lines(row(prompt="")), "{file} row 1: field 'prompt': the prompt is empty"),
    "a null": Bad("a.jsonl", lines(GOOD, row(rejected=None)), "{file} row 2: field 'rejected': must be text, not null"),
    "nulls only": Bad(
        "a.jsonl", lines(row(chosen=None, rejected=None)), "{file} row 1: field 'chosen': must be text, not null"
    ),
    "a number": Bad("a.jsonl", lines(row(chosen=4)), "{file} row 1: field 'chosen': must be text, not a number"),
    "a number for a prompt": Bad(
        "a.jsonl", lines(row(prompt=4.5)), "{file} row 1: field 'prompt': must be text, not a number"
    ),
    "a boolean": Bad(
        "a.jsonl", lines(row(rejected=True)), "{file} row 1: field 'rejected': must be text, not a boolean"
    ),
    "an object": Bad(
        "a.jsonl", lines(row(chosen={"text": "a"})), "{file} row 1: field 'chosen': must be text, not an object"
    ),
    "NaN": Bad(
        "a.jsonl",
        b'{"prompt": NaN, "chosen": "a", "rejected": "b"}\n',
        "{file} row 1: field 'prompt': must be text, not a number",
    ),
    "half a surrogate pair": Bad(
        "a.jsonl",
        lines(row(chosen="\ud83d")),
        "{file} row 1: field 'chosen': has half of a surrogate pair, which is no character",
    ),
    "an escaped NUL": Bad(
        "a.jsonl", lines(row(chosen="a\0")), "{file} row 1: field 'chosen': has a NUL character, which no text has"
    ),
    "100 MB in one line": Bad(
        "a.jsonl",
        lambda: lines(GOOD) + b'{"prompt": "q", "rejected": "b", "chosen": "' + b"a" * 100_000_000 + b'"}\n',
        "{file} row 2: field 'chosen': has 100,000,000 characters; more than 10,000,000 are taken for a mistake",
    ),
    # Transcripts
    "an empty HH answer": Bad(
        "a.jsonl",
        hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:"),
        "{file} row 1: field 'rejected': the completion is empty",
    ),
    "HH transcripts of different prompts": Bad(
        "a.jsonl",
        hh("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d"),
        "{file} row 1: fields 'chosen' and 'rejected': share no prompt that an assistant's turn follows",
    ),
    "text before the first turn": Bad(
        "a.jsonl",
        hh("Well.\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"),
        "{file} row 1: field 'chosen': not a transcript: must begin with 'Human:'",
    ),
    "an HH answer that ends in a question": Bad(
        "a.jsonl",
        hh("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d"),
        "{file} row 1: field 'chosen': the completion must end with an assistant's turn, not user's",
    ),
    "a prompt that ends with an answer": Bad(
        "a.jsonl",
        lines(row(prompt="Human: a\n\nAssistant: b")),
        "{file} row 1: field 'prompt': must end with a user's turn",
    ),
    # Messages
    "a null among messages": Bad(
        "a.jsonl",
        messages(chosen=[None]),
        "{file} row 1: field 'chosen', message 1: must be an object with 'role' and 'content', not null",
    ),
    "a null in a message": Bad(
        "a.jsonl",
        messages(rejected=[{"role": "assistant", "content": None}]),
        "{file} row 1: field 'rejected', message 1: 'content' must be text, not null",
    ),
    "a part of content that is no text": Bad(
        "a.jsonl",
        messages(chosen=[{"role": "assistant", "content": [{"type": "image", "url": "a"}]}]),
        "{file} row 1: field 'chosen', message 1: 'content' has a part that is no text (image)",
    ),
    "a message without a role": Bad(
        "a.jsonl", messages(chosen=[{"content": "a"}]), "{file} row 1: field 'chosen', message 1: 'role' is missing"
    ),
    "an unknown role": Bad(
        "a.jsonl",
        messages(chosen=[{"role": "narrator", "content": "a"}]),
        "{file} row 1: field 'chosen', message 1: 'role' must be one of system, user, assistant, tool, not 'narrator'",
    ),
    "no messages": Bad(
        "a.jsonl",
        messages(rejected=[]),
        "{file} row 1: field 'rejected': must be a list of messages, not an empty one",
    ),
    "text among messages": Bad(
        "a.jsonl", messages(rejected="b"), "{file} row 1: field 'rejected': must be a list of messages, not text"
    ),
    "a user's turn for an answer": Bad(
        "a.jsonl",
        messages(chosen=[{"role": "user", "content": "a"}]),
        "{file} row 1: field 'chosen': the completion must begin with an assistant's turn, not user's",
    ),
    "nothing but the prompt": Bad(
        "a.jsonl", messages(chosen=[USER]), "{file} row 1: field 'chosen': the completion is empty"
    ),
    "a late system turn": Bad(
        "a.jsonl",
        messages(prompt=[USER, {"role": "system", "content": "s"}, USER]),
        "{file} row 1: field 'prompt': a system turn may only come first",
    ),
    "ShareGPT without turns": Bad(
        "a.jsonl",
        sharegpt(conversations=[]),
        "{file} row 1: field 'conversations': must be a list of messages, not an empty one",
    ),
    "ShareGPT with an unknown speaker": Bad(
        "a.jsonl",
        sharegpt(chosen={"from": "bot", "value": "a"}),
        "{file} row 1: field 'chosen', message 1: 'from' must be one of human, user, gpt, assistant, system, not 'bot'",
    ),
    "ShareGPT with a plain answer": Bad(
        "a.jsonl", sharegpt(rejected="b"), "{file} row 1: field 'rejected': must be a list of messages, not text"
    ),
    # Bytes
    "Latin-1": Bad(
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "gr\xfcn", "chosen": "a", "rejected": "b"}\n',
        "{file} row 2: field 'prompt': byte 0xfc is not UTF-8; " + LATIN1,
    ),
    "Latin-1 in a message": Bad(
        "a.jsonl",
        b'{"prompt": "q", "chosen": [{"role": "assistant", "content": "gr\xfcn"}], "rejected": []}\n',
        "{file} row 1: field 'chosen': byte 0xfc is not UTF-8; " + LATIN1,
    ),
    "Latin-1 in an array": Bad(
        "a.json", b'[\n{"prompt": "gr\xfcn"}]', "{file} line 2: byte 0xfc is not UTF-8; " + LATIN1
    ),
    "Latin-1 in CSV": Bad(
        "a.csv", HEADER + b"q,a,b\ngr\xfcn,a,b\n", "{file} line 3: byte 0xfc is not UTF-8; " + LATIN1
    ),
    "UTF-16": Bad(
        "a.jsonl",
        lines(GOOD).decode().encode("utf-16"),
        "{file}: is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8",
    ),
    "a NUL byte": Bad(
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "q", "chosen": "a\0", "rejected": "b"}\n',
        "{file} row 2: field 'chosen': has a NUL byte, which no text has",
    ),
    "NUL bytes only": Bad("a.jsonl", b"\0" * 512, "{file} row 1: has a NUL byte, which no text has"),
    "a NUL byte in an array": Bad(
        "a.json", b'[{"prompt": "q\0"}]', "{file}: has a NUL byte at 15, so it is no text file"
    ),
    "a NUL byte in CSV": Bad(
        "a.csv", HEADER + b"q,a\0,b\n", "{file} row 1: field 'chosen': has a NUL character, which no text has"
    ),
    # JSON
    "half a line": Bad(
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "q", "chos',
        "{file} row 2: not JSON: Unterminated string starting at character 17, near '\"chos'",
    ),
    "a line without its end": Bad(
        "a.jsonl",
        lines(GOOD).strip()[:-1],
        "{file} row 1: not JSON: Expecting ',' delimiter at character 47, where the text ends",
    ),
    "single quotes": Bad(
        "a.jsonl",
        b"{'prompt': 'q'}\n",
        "{file} row 1: not JSON: Expecting property name enclosed in double quotes at character 2, near "
        "\"'prompt': 'q'}}\"",
    ),
    "a comma too many": Bad(
        "a.json", b'[{"prompt": "q"},]', "{file} row 2: not JSON: Expecting value at character 18, near ']'"
    ),
    "two rows on one line": Bad(
        "a.jsonl",
        b'{"prompt": "q"} {"prompt": "r"}\n',
        '{file} row 1: not JSON: a second value at character 16, near \'{{"prompt": "r"}}\'',
    ),
    "an unescaped newline": Bad(
        "a.jsonl",
        b'{"prompt": "q\nr", "chosen": "a", "rejected": "b"}\n',
        "{file} row 1: not JSON: Unterminated string starting at character 12, near '\"q'",
    ),
    "a list cut off": Bad(
        "a.json",
        b'[{"prompt": "q"}, {"prompt": "r"',
        "{file} row 2: not JSON: Expecting ',' delimiter at character 33, where the text ends",
    ),
    "a list without its end": Bad(
        "a.json",
        b'[{"prompt": "q"}',
        "{file} row 1: not JSON: no comma and no end of the list after it at character 17, where the text ends",
    ),
    "two lists": Bad(
        "a.json",
        json.dumps([GOOD]).encode() * 2,
        '{file}: not JSON: more after the list at character 50, near \'[{{"prompt": "q", "ch\'',
    ),
    "a list in .jsonl": Bad(
        "a.jsonl",
        json.dumps([GOOD]).encode(),
        "{file} row 1: begins a list, but .jsonl has an object a line; rename the file to .json",
    ),
    "a single value": Bad("a.json", b"5", "{file} row 1: must be an object with columns, not a number"),
    "a null for a row": Bad("a.jsonl", b"null\n", "{file} row 1: must be an object with columns, not null"),
    "rows that are lists": Bad(
        "a.json", b'[["q", "a", "b"]]', "{file} row 1: must be an object with columns, not a list"
    ),
    "nested without end": Bad("a.json", b"[" * 100_000, "{file} row 1: not JSON: nested too deeply"),
    "nested without end in a line": Bad(
        "a.jsonl", b'{"prompt": ' * 100_000, "{file} row 1: not JSON: nested too deeply"
    ),
    "a number of 5,000 digits": Bad(
        "a.jsonl",
        b'{"prompt": ' + b"9" * 5000 + b"}\n",
        "{file} row 1: not JSON: Exceeds the limit (4300 digits) for integer string conversion: …",
    ),
    "a key twice": Bad(
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
        "{file} row 2: field 'chosen': is there twice",
    ),
    "a key twice in a message": Bad(
        "a.json",
        b'[{"prompt": "q", "chosen": [{"role": "user", "role": "assistant", "content": "a"}]}]',
        "{file} row 1: field 'role': is there twice",
    ),
    "a web page": Bad(
        "a.jsonl",
        b"<!DOCTYPE html>\n<html>\n",
        "{file} row 1: not JSON: Expecting value at character 1, near '<!DOCTYPE html>'",
    ),
    "a Git LFS pointer": Bad(
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "{file} row 1: not JSON: Expecting value at character 1, near 'version https://git-'",
    ),
    # Nothing there
    "an empty file": Bad("a.jsonl", b"", NO_ROWS),
    "an empty .json": Bad("a.json", b" \n", NO_ROWS),
    "blank lines": Bad("a.jsonl", b"\n \r\n", NO_ROWS),
    "an empty list": Bad("a.json", b"[ ]", NO_ROWS),
    "a byte order mark only": Bad("a.json", b"\xef\xbb\xbf", NO_ROWS),
    "a header only": Bad("a.csv", HEADER, NO_ROWS),
    "an empty CSV": Bad("a.csv", b"", NO_ROWS),
    "an empty gzip": Bad("a.jsonl.gz", gzip.compress(b"", mtime=0), NO_ROWS),
    "parquet without rows": Bad("a.parquet", lambda: parquet([], pyarrow.schema({"prompt": "string"})), NO_ROWS),
    # CSV
    "a short CSV row": Bad("a.csv", HEADER + b"q,a,b\nq,a\n", "{file} row 2: has 2 fields, the header 3"),
    "a long CSV row": Bad("a.csv", HEADER + b"q,a,b,c\n", "{file} row 1: has 4 fields, the header 3"),
    "an open quote": Bad("a.csv", HEADER + b'q,a,b\nq,a,"b\n', "{file} row 2: not CSV: a quoted field has no end"),
    "a quote in a quoted field": Bad(
        "a.csv", HEADER + b'q,"a"b",c\n', "{file} row 1: not CSV: ',' expected after '\"'"
    ),
    "an empty CSV field": Bad("a.csv", HEADER + b"q,,b\n", "{file} row 1: field 'chosen': the completion is empty"),
    "a CSV column twice": Bad(
        "a.csv", b"prompt,chosen,chosen\nq,a,b\n", "{file}: column 'chosen' appears twice in the header"
    ),
    "semicolons": Bad(
        "a.csv",
        b"prompt;chosen;rejected\nq;a;b\n",
        "{file}: the header 'prompt;chosen;rejected' is one column: columns are separated by commas",
    ),
    "no header": Bad("a.csv", b"q,a,b\nr,a,b\n", "{file} row 1: " + NO_FORMAT.format(columns="q, a, b")),
    # gzip
    "a gzip cut off": Bad(
        "a.jsonl.gz",
        PACKED[:-20],
        "{file}: cannot be read: Compressed file ended before the end-of-stream marker was reached",
    ),
    "a gzip with wrong bytes": Bad(
        "a.jsonl.gz",
        PACKED[:60] + b"\xff" * 20 + PACKED[80:],
        "{file}: cannot be read: Error -3 while decompressing data: …",
    ),
    "a gzip with a wrong checksum": Bad(
        "a.jsonl.gz", PACKED[:-8] + b"\0" * 4 + PACKED[-4:], "{file}: cannot be read: CRC check failed 0x0 != …"
    ),
    "no gzip": Bad("a.jsonl.gz", lines(GOOD), "{file}: cannot be read: Not a gzipped file (b'{{\"')"),
    "a gzip called .jsonl": Bad("a.jsonl", PACKED, "{file}: is packed with gzip; let its name end in .gz"),
    # parquet
    "no parquet": Bad("a.parquet", lines(GOOD), "{file}: not parquet, or a damaged file: …"),
    "parquet cut off": Bad(
        "a.parquet", lambda: parquet([GOOD] * 50)[:-30], "{file}: not parquet, or a damaged file: …"
    ),
    "parquet with lists of text": Bad(
        "a.parquet",
        lambda: parquet([row(chosen=["a"], rejected=["b"])]),
        "{file} row 1: field 'chosen', message 1: must be an object with 'role' and 'content', not text",
    ),
    "parquet with a null message": Bad(
        "a.parquet",
        lambda: parquet([row(chosen=[ANSWER], rejected=[ANSWER]), row(chosen=[ANSWER], rejected=[None])]),
        "{file} row 2: field 'rejected', message 1: must be an object with 'role' and 'content', not null",
    ),
    "parquet with bytes": Bad(
        "a.parquet",
        lambda: parquet([row(prompt=b"q")]),
        "{file} row 1: field 'prompt': must be text, not of the type bytes",
    ),
    "parquet with dates": Bad(
        "a.parquet",
        lambda: parquet([row(prompt=datetime.date(2026, 1, 1))]),
        "{file} row 1: field 'prompt': must be text, not of the type date",
    ),
    "parquet with Latin-1": Bad(
        "a.parquet", parquet_with_latin1, "{file} row 2: field 'prompt': byte 0xfc is not UTF-8"
    ),
    # Not data
    "another suffix": Bad("a.txt", lines(GOOD), "--dataset_name {file}: not one of " + SUFFIXES),
    "a spreadsheet": Bad("a.xlsx", b"PK\x03\x04", "--dataset_name {file}: not one of " + SUFFIXES),
}
