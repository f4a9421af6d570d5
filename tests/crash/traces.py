"""What a run leaves, without what may differ between two runs of the same: times, its id, and logs."""

import json
import re
from pathlib import Path
from typing import Any

from tandem.runs import LOCK, MANIFEST, RUN, sha256_file

# Logs say what was done once for each time it was done; hashes.json knows files by their times
_LOGS = ("train.log", "dpo_pipeline_sanity.log", "rounds.log", "hashes.json", LOCK)
# In the order in which answers came, of which several are waited for; one that a kill cut off is asked for again
_IN_ANY_ORDER = ("raw.jsonl", "verdicts.jsonl", "scores_cache.jsonl")
_TIMES_OF_REPORT = re.compile(
    r"written [^<]* UTC|<td[^>]*>[\d.]+ (s|min|h)\b[^<]*|<figcaption><b>Memory</b>.*?</svg>", re.DOTALL
)
_CLOCKS = re.compile(r"runtime|_per_second|system/|seconds|^time|_at$|total_flos")


def normal(folder: Path) -> dict[str, Any]:
    """Each file below `folder` by its place: its content where that is read here, else its hash."""
    return {
        str(file.relative_to(folder)): _content(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in _LOGS and not file.name.endswith(".sqlite")
    }


def _content(file: Path) -> Any:
    try:
        if file.suffix == ".json" and file.name != "tokenizer.json":
            value = json.loads(file.read_text())
            if file.name == RUN:
                value.pop("id")
                value.pop("replaced", None)  # other runs' ids, one more each time that a run starts over
            if file.name == MANIFEST:  # what it says of files with times differs, and `halves` has compared it
                return sorted(value["files"])
            return _timeless(value)
        if file.suffix == ".jsonl":
            lines = [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
            return sorted({json.dumps(line) for line in lines}) if file.name in _IN_ANY_ORDER else lines
        if file.suffix == ".html":
            return _TIMES_OF_REPORT.sub("", file.read_text())
    except ValueError:
        pass
    return sha256_file(file)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if not _CLOCKS.search(name)}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    return value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where two runs are not the same, a line a file."""
    lines = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"too many: {name}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            lines.append(f"differs: {name}: {_first(expected[name], found[name])}")
    return lines


def _first(expected: Any, found: Any) -> str:
    """The first place where two values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                return f"{name}: {_first(expected.get(name), found.get(name))}"
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"{len(expected)} items, {len(found)} now"
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            if one != other:
                return f"[{index}] {_first(one, other)}"
    return f"{str(expected)[:100]!r}, now {str(found)[:100]!r}"
