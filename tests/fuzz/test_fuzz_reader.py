"""Any file at all, through the reader: pairs, or a UserError of one line. `make fuzz` looks longer and deeper."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tandem.data.files import SUFFIXES
from tests.bad_files import lines
from tests.fuzz.reader import GOOD_FILES, GOOD_ROWS, read, seeds

texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["\n\nHuman: q\n\nAssistant: a", "Human: q", "\0", "\ud83d", "", " ", "user", "assistant", "gpt"]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", ""]), inner, max_size=3),
    ),
    max_leaves=8,
)
columns = ["prompt", "chosen", "rejected", "question", "instruction", "input", "system", "conversations", "images", "q"]
rows: st.SearchStrategy[dict[str, Any]] = st.dictionaries(st.sampled_from(columns), values, max_size=6)
documents = st.lists(rows, max_size=4).flatmap(
    lambda found: st.sampled_from(
        [json.dumps(found).encode(), b"\n".join(json.dumps(row).encode("utf-8", "surrogatepass") for row in found)]
    )
)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good row, with another value somewhere in it."""
    row = node = copy.deepcopy(draw(st.sampled_from(GOOD_ROWS)))
    while True:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or draw(st.integers(0, 3)) == 0:
            node[key] = draw(values)
            return bytes([SUFFIXES.index(".jsonl"), 0]) + lines(row)
        node = node[key]


headers = st.tuples(st.integers(0, len(SUFFIXES) - 1), st.integers(0, 255)).map(bytes)
damaged = st.tuples(st.sampled_from(seeds()), st.integers(0, 4096), st.integers(0, 20), st.binary(max_size=8)).map(
    lambda parts: parts[0][: parts[1]] + parts[3] + parts[0][parts[1] + parts[2] :]
)
inputs = st.one_of(
    spoiled(), damaged, st.builds(bytes.__add__, headers, documents), st.builds(bytes.__add__, headers, st.binary())
)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@settings(unhurried, max_examples=300)
@given(inputs)
@example(data=b'\x01\x00{"prompt": "q", "chosen": {"from": []}, "rejected": "b", "system": "s"}\n')
def test_any_file(tmp_path: Path, data: bytes):
    read(data, tmp_path)


@pytest.mark.slow
@settings(unhurried, max_examples=50_000)
@given(inputs)
def test_very_many_files(tmp_path: Path, data: bytes):
    read(data, tmp_path)


@pytest.mark.parametrize(("name", "content"), GOOD_FILES)
def test_the_good_seeds_are_read(tmp_path: Path, name: str, content: bytes):
    """Else the fuzzer would start from nothing."""
    assert read(bytes([SUFFIXES.index(name.removeprefix("a")), 0]) + content, tmp_path) >= 1
