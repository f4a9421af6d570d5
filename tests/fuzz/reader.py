"""One input of a fuzzer through the whole reader: a file of any kind, read with any options."""

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

from tandem.data.files import SUFFIXES
from tandem.data.formats import FORMATS
from tandem.data.options import DataOptions
from tandem.data.sources import load_splits
from tandem.errors import UserError, one_line
from tests.bad_files import ANSWER, BAD_FILES, GOOD, USER, lines, parquet

GOOD_ROWS: tuple[dict[str, Any], ...] = (
    GOOD | {"system": "s"},
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    GOOD | {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    {"instruction": "i", "input": "j", "chosen": "a", "rejected": "b"},
    {"question": "q", "system": "s", "chosen": "a", "rejected": "b"},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
)
GOOD_FILES = (
    *(("a.jsonl", lines(row)) for row in GOOD_ROWS),
    ("a.json", json.dumps([GOOD_ROWS[2]] * 2).encode()),
    ("a.csv", b'prompt,chosen,rejected\n"q ""x""\n",a,b\n'),
    ("a.parquet", parquet([GOOD_ROWS[2]] * 3)),
)


def seeds() -> list[bytes]:
    """Inputs to start from: good files and the corpus of bad ones, read with the options that most are meant for."""
    files = [*GOOD_FILES, *((bad.name, bad.data) for bad in BAD_FILES.values())]
    return [
        bytes([SUFFIXES.index(suffix), 0]) + content
        for name, content in files
        if len(content) < 4096 and (suffix := name.removeprefix("a")) in SUFFIXES
    ]


def read(data: bytes, folder: Path) -> int:
    """Read the file that `data` stands for, and return the number of its pairs.

    The first byte is the file's suffix, the second the options, the rest the file's content.

    Raises:
        Anything but a UserError with a message of one line: what the fuzzer is after.
    """
    kind, flags = (*data[:2], 0, 0)[:2]
    suffix = SUFFIXES[kind % len(SUFFIXES)]
    content = data[2:]
    if suffix.endswith(".gz") and flags & 128:
        content = gzip.compress(content, compresslevel=1)
    file = folder / f"a{suffix}"
    file.write_bytes(content)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            pairs, held_out = load_splits(
                DataOptions(
                    str(file),
                    data_format=(None, *FORMATS)[flags % 7],
                    val_ratio=0.5 if flags & 8 else 0.0,
                    max_bad_rows=3 if flags & 16 else 0,
                    prompt_key="q" if flags & 32 else None,
                    system_key="s" if flags & 64 else None,
                )
            )
    except UserError as error:
        line = one_line(str(error))
        assert line.isprintable() and (str(folder) in line or line.startswith("--")), line
        return 0
    for pair in pairs + held_out:
        kinds = {type(pair[side]) for side in ("prompt", "chosen", "rejected")}
        assert kinds in ({str}, {list}), pair
    return len(pairs) + len(held_out)
