import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.runs import (
    LOCK,
    MANIFEST,
    append_jsonl,
    checkpoints,
    damage,
    discard,
    is_complete,
    locked,
    read_jsonl,
    run_id,
    sha256_file,
    sha256_json,
    staged_dir,
    write_atomic,
    write_json,
    write_manifest,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=5,
)
records = st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5)


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path):
    file = tmp_path / "deep" / "file"
    write_atomic(file, "old")
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(file.parent) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    file = tmp_path / "file"
    write_atomic(file, "old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_has_left_of_a_write_is_used_by_the_next(tmp_path: Path):
    file = tmp_path / "file"
    code = (
        "import os, sys; from tandem.runs import write_atomic\n"
        "os.fsync = lambda file: os._exit(9)\n"
        "write_atomic(sys.argv[1], 'a' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(file)]).returncode == 9
    assert len(os.listdir(tmp_path)) == 1 and not file.exists()
    write_atomic(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_writers_of_one_file_take_turns(tmp_path: Path):
    file, contents = tmp_path / "file", [str(number) * 50_000 for number in range(4)]

    def write(content: str) -> set[str]:
        seen = set()
        for _ in range(25):
            write_atomic(file, content)
            seen.add(file.read_text())
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(write, contents))
    assert seen <= set(contents)
    assert os.listdir(tmp_path) == ["file"]


def test_write_json_refuses_what_json_has_not(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", {"value": float("nan")})
    assert not (tmp_path / "file").exists()


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    """A process rewrites a file without pause, and is killed: every read is one whole version."""
    file = tmp_path / "file"
    code = (
        "import sys, itertools; from tandem.runs import write_atomic\n"
        "for i in itertools.count(): write_atomic(sys.argv[1], str(i % 10) * 100_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        while not file.exists():
            time.sleep(0.01)
        reads = [file.read_text() for _ in range(50)]
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    for text in [*reads, file.read_text()]:
        assert text == text[0] * 100_000


@given(records, st.data())
def test_a_torn_tail_loses_one_record_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], data: st.DataObject
):
    """Cut the file anywhere in its last line: the lines before it stand, and so does the one appended after."""
    file = tmp_path_factory.getbasetemp() / "torn.jsonl"
    file.unlink(missing_ok=True)
    for row in rows:
        append_jsonl(file, row)
    assert read_jsonl(file) == rows
    whole = file.read_bytes()
    last_line = len(json.dumps(rows[-1], ensure_ascii=False).encode()) + 1
    cut = data.draw(st.integers(1, last_line))
    file.write_bytes(whole[:-cut])
    assert read_jsonl(file) == rows[:-1]
    append_jsonl(file, {"after": 1})
    assert read_jsonl(file) == [*rows[:-1], {"after": 1}]


def test_read_jsonl_of_nothing(tmp_path: Path):
    assert read_jsonl(tmp_path / "missing.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_jsonl(tmp_path / "empty.jsonl") == []


def test_line_separators_in_a_text_do_not_end_a_record(tmp_path: Path):
    row = {"text": "a\u2028b\x85c\x0bd\r\ne"}
    append_jsonl(tmp_path / "file", row)
    assert read_jsonl(tmp_path / "file") == [row]


def test_staged_dir_appears_complete(tmp_path: Path):
    target = tmp_path / "out"
    with staged_dir(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("22")
        assert not target.exists()
    assert is_complete(target)
    files = json.loads((target / MANIFEST).read_text())["files"]
    assert {name: listed["bytes"] for name, listed in files.items()} == {"a": 1, "sub/b": 2}
    assert os.listdir(tmp_path) == ["out"]


def test_staged_dir_replaces_the_whole_folder(tmp_path: Path):
    target = tmp_path / "out"
    for name in ("old", "new"):
        with staged_dir(target) as folder:
            (folder / name).touch()
    assert sorted(os.listdir(target)) == [MANIFEST, "new"]
    assert os.listdir(tmp_path) == ["out"]


class Killed(BaseException):
    """In the place of SIGKILL: nothing that is there to catch errors catches it."""


def make(target: Path, name: str) -> None:
    with staged_dir(target) as folder:
        (folder / name).write_text(name)


def killing_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let this many calls that change a disk pass; the next one, and all that would come after it, never happen."""
    left = count

    def watch(call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **keywords)

        return watched

    for name in ("rename", "replace", "fsync", "rmdir", "unlink", "mkdir"):
        patch.setattr(os, name, watch(getattr(os, name)))


def test_a_kill_at_any_call_leaves_the_folder_whole_or_absent_and_the_next_attempt_ends_right(tmp_path: Path):
    for count in range(100):
        target = tmp_path / str(count) / "out"
        make(target, "old")
        with pytest.MonkeyPatch.context() as patch:
            killing_after(patch, count)
            try:
                make(target, "new")
                break
            except Killed:
                pass
        if target.exists():
            assert damage(target) is None
        for manifest in target.parent.rglob(MANIFEST):  # of what is being removed, too
            assert damage(manifest.parent) is None
        make(target, "newer")
        assert damage(target) is None
        assert sorted(os.listdir(target)) == [MANIFEST, "newer"]
        assert os.listdir(target.parent) == ["out"]
    assert 8 < count < 99


def test_a_folder_that_a_kill_left_under_its_old_name_comes_back(tmp_path: Path):
    """Between the two renames: an attempt that then fails must find, and leave, the old content in its place."""
    target = tmp_path / "out"
    make(target, "old")
    target.rename(tmp_path / ".out.old")
    with pytest.raises(RuntimeError, match="half-way"), staged_dir(target):
        raise RuntimeError("half-way")
    assert damage(target) is None and (target / "old").exists()


def test_staged_dir_changes_nothing_on_an_error(tmp_path: Path):
    target = tmp_path / "out"
    with staged_dir(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), staged_dir(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("half-way")
    assert (target / "a").read_text() == "old"
    assert is_complete(target)
    with staged_dir(target) as folder:  # what the failed one left does not get in
        assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("missing", "a is missing"),
        ("shorter", "a has 2 bytes, not 3"),
        ("a bit flipped", "the content of a has changed"),
        ("no manifest", "it has no manifest: its writing was cut off"),
        ("torn manifest", "its manifest cannot be read"),
        ("another manifest", "its manifest cannot be read"),
    ],
)
def test_a_folder_with_harm_is_not_complete(tmp_path: Path, harm: str, told: str):
    (tmp_path / "a").write_text("123")
    write_manifest(tmp_path)
    assert is_complete(tmp_path)
    assert damage(tmp_path) is None
    match harm:
        case "a bit flipped":
            (tmp_path / "a").write_text("122")
        case "another manifest":
            (tmp_path / MANIFEST).write_text('{"files": {"a": 3}}')
        case "missing":
            (tmp_path / "a").unlink()
        case "shorter":
            (tmp_path / "a").write_text("12")
        case "no manifest":
            (tmp_path / MANIFEST).unlink()
        case "torn manifest":
            (tmp_path / MANIFEST).write_text('{"files": {"a"')
    assert damage(tmp_path) == told
    assert is_complete(tmp_path) == (harm == "a bit flipped")  # which only reading every byte tells


def test_what_is_discarded_says_whose_it_was_to_the_last(tmp_path: Path):
    for count in range(100):
        folder = tmp_path / str(count)
        (folder / "deep").mkdir(parents=True)
        for name in ("a", "deep/b", "run.json", "z"):
            (folder / name).write_text('{"id": "mine"}')
        write_manifest(folder)
        with pytest.MonkeyPatch.context() as patch:
            killing_after(patch, count)
            try:
                discard(folder)
                break
            except Killed:
                pass
        assert run_id(folder) == "mine" or not any(folder.iterdir())
        assert damage(folder) is None or not (folder / MANIFEST).exists()
    assert 5 < count < 99


def test_checkpoints_by_step(tmp_path: Path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "skipped_checkpoint-3", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_hashes(tmp_path: Path):
    (tmp_path / "abc").write_text("abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_file(tmp_path / "abc") == abc
    assert sha256_json({"b": 1, "a": "ü"}) == sha256_json({"a": "ü", "b": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])
    assert sha256_json("\ud800") != sha256_json("\ud801")  # half a surrogate pair can come out of JSON


@given(json_values)
def test_sha256_json_depends_on_the_value_alone(value: object):
    assert sha256_json(value) == sha256_json(json.loads(json.dumps(value)))


def holding(folder: Path, seconds: float) -> "subprocess.Popen[str]":
    """A process that has locked `folder`, and lets go of it after a while."""
    code = (
        "import sys, time; from tandem.runs import locked\nwith locked(sys.argv[1]): print(flush=True); time.sleep(%f)"
    )
    process = subprocess.Popen([sys.executable, "-c", code % seconds, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_folder_is_held_until_its_process_is_gone(tmp_path: Path):
    folder = tmp_path / "out"
    holder = holding(folder, 60)
    told = f"{folder}: process {holder.pid} on {socket.gethostname()} is writing there; wait for it, or end it"
    with pytest.raises(UserError, match=told), locked(folder):
        pass
    holder.kill()
    holder.communicate()
    assert (folder / LOCK).exists()  # what a kill leaves is in nobody's way
    with locked(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_holder_that_goes_away_is_waited_for(tmp_path: Path):
    holder = holding(tmp_path / "out", 0.5)
    with locked(tmp_path / "out", patience=30):
        assert (tmp_path / "out" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    holder.communicate()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
