"""Describes, by content, what tokenized rows depend on: files that are read, tokenizer, chat template, code.

Descriptions are values of JSON, whose hash is a key: the same key means the same tokens. Where a description cannot
guarantee that, it is None, and nothing is kept.
"""

import dataclasses
import functools
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import tandem
from tandem.data.mixtures import sources_of
from tandem.data.options import DataOptions
from tandem.data.sources import of_own_split
from tandem.data.splits import files_of, has_test_split, is_local, load_hub
from tandem.errors import UserError
from tandem.runs import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PACKAGES = (
    "transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy", "pyyaml", "sentencepiece", "tiktoken",
    "mistral-common", "regex", "protobuf",
    # Of tokenizers without an engine, for one language
    "ftfy", "sacremoses", "fugashi", "ipadic", "unidic", "unidic-lite", "sudachipy", "rhoknp", "jieba", "rjieba",
    "pythainlp", "underthesea", "emoji",
)  # fmt: skip
_PACKED = 4  # a compressed file's text is about this many times as large
# By these a template renders the same row otherwise at another time
_UNSTEADY = re.compile(r"strftime_now|\b(?:random|lipsum)\b")
# Attributes of a tokenizer that say where it is from
_PLACES = {"name_or_path", "vocab_file", "tokenizer_file", "cache_dir"}


def code_content() -> Any:
    """The code that turns rows into tokens: the content of Tandem's own files, and the versions of the libraries."""
    return [_code(), platform.python_version(), {name: _version(name) for name in _PACKAGES}, sys.byteorder]


@functools.cache
def _code() -> str:
    folder = Path(tandem.__file__).parent
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".jinja"))
    return _hash_of([(str(file.relative_to(folder)), _hash(file)) for file in files])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Content:
    """What rows are read from.

    Attributes:
        told: options, names and hashes, as values of JSON.
        size: about how many bytes of text there are.
    """

    told: Any
    size: int


def data_content(options: DataOptions, *, training: bool, held_out: bool) -> Content | None:
    """The rows that a run reads: options, and names and content of the files.

    Args:
        training: whether training rows are read.
        held_out: whether held-out rows are read.

    Returns:
        None where a function of the user's makes the rows, or the files are not known.

    Raises:
        UserError: data that cannot be found or read.
    """
    found, size = [], 0
    sources = [dataclasses.replace(source, options=of_own_split(source.options)) for source in sources_of(options)]
    # Where nothing is held out, `load_held_out` measures the training pairs
    training = training or not any(has_test_split(source.options) for source in sources)
    for source in sources:
        own = source.options
        if own.row_function is not None:
            return None
        splits = [own.dataset_train_split] if training or own.val_ratio else []
        # What one source of a mixture holds out is removed from the training prompts of the others
        if (held_out or options.val_ratio) and not own.val_ratio and has_test_split(own):
            splits.append(own.dataset_test_split)
        contents = []
        for split in splits:
            name, files = _files(own, split)
            if not files:
                return None
            size += sum(_size(file) for file in files)
            contents.append([name, [[str(file), _hash_at(file)] for file in files]])
        found.append([dataclasses.asdict(own), source.weight, contents])
    return Content([type(options).__name__, dataclasses.asdict(options), training, held_out, found], size)


def _files(options: DataOptions, split: str) -> tuple[str, list[Path]]:
    """The name of a split, with its slice, and the files that hold it; no files where that is not known."""
    if is_local(options.dataset_name):
        return files_of(options, split)
    name, rows = load_hub(options, split)
    return name, [Path(each["filename"]) for each in getattr(rows, "cache_files", [])]


def _size(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    packed = (".gz", ".parquet")
    return sum(file.stat().st_size * (_PACKED if file.suffix.lower() in packed else 1) for file in files)


def _hash_at(path: Path) -> str:
    """The hash of a file, or of all files in a folder."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return _hash_of([(str(file.relative_to(path)), _hash(file)) for file in files])
        return _hash(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _hash(file: Path) -> str:
    return f"{file.stat().st_size} {file_hash(file)}"


def _hash_of(parts: Sequence[tuple[str, str]]) -> str:
    return xxhash.xxh3_128(repr(parts).encode()).hexdigest()


def tokenizer_content(tokenizer: "PreTrainedTokenizerBase") -> Any | None:
    """All that a tokenizer's ids and its chat template's text depend on.

    Returns:
        None where it has code of its own or cannot be described, or its template asks for the time or for chance.
    """
    owner, template = type(tokenizer), tokenizer.chat_template
    if not owner.__module__.startswith("transformers.") or _UNSTEADY.search(str(template)):
        return None
    plain = {
        name: value
        for name, value in sorted(vars(tokenizer).items())
        if isinstance(value, str | int | float | bool | None) and name not in _PLACES
    }
    specials = [
        [id, str(token), token.special, token.lstrip, token.rstrip, token.normalized, token.single_word]
        for id, token in sorted(tokenizer.added_tokens_decoder.items())
    ]
    engine = _engine(tokenizer)
    if engine is None:
        return None
    named = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return [f"{owner.__module__}.{owner.__qualname__}", template, plain, specials, named, engine]


def _engine(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    if not tokenizer.is_fast:
        with tempfile.TemporaryDirectory() as folder:
            try:
                tokenizer.save_pretrained(folder)
            except Exception:  # a library's own code may raise anything
                return None
            return _hash_at(Path(folder))
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    try:
        text = backend.to_str()
    except Exception:  # it has a part that is a Python object
        return None
    return xxhash.xxh3_128(text.encode()).hexdigest()
