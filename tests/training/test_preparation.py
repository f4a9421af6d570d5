"""One preparation: the token ids of a plain loop, made in chunks by several processes, kept by content."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from tandem.data import chunks
from tandem.data.content import data_content
from tandem.data.options import DataOptions
from tandem.data.pairs import PairMaker, rendered
from tandem.data.prepare import TRAIN, Rows, prepare
from tandem.data.rows import Row
from tandem.data.several import as_rows, first_rows
from tandem.data.sources import load_held_out, load_splits, load_training
from tandem.data.token_cache import TokenCache
from tandem.data.tokenized import token_hash, tokenize_rows
from tandem.errors import UserError
from tandem.options.parsing import parse
from tandem.runs import sha256_json
from tandem.training.option_sets import DPOOptionSet, classes
from tandem.training.preparation import TrainingData, training_data
from tests import tiny

CHAT = [
    {"prompt": [{"role": "user", "content": f"Question {number}?"}],
     "chosen": [{"role": "assistant", "content": "yes " * (number % 7 + 1)}],
     "rejected": [{"role": "assistant", "content": "no"}]}
    for number in range(30)
]  # fmt: skip
SEVERAL = [
    row | {"chosen": [*row["chosen"], {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Ok"}]}
    if number == 17
    else row
    for number, row in enumerate(CHAT)
]
TEXTS = [{"prompt": f"Say {number}", "chosen": f"it is {number}", "rejected": "no" * number} for number in range(1, 31)]
LISTS = [
    row | {"rejected": ["no", f"not {number}"], "weight": number / 7, "margin": [0.5, 1]} if number % 3 else
    row | {"weight": 2, "margin": 0}
    for number, row in enumerate(TEXTS)
]  # fmt: skip
ROWS = {"hh": tiny.hh_rows(30), "text": TEXTS, "messages": CHAT, "several turns": SEVERAL, "lists": LISTS}


def run_of(data: Path, cache: Path, kind: Any = DPOOptionSet, **given: Any) -> Any:
    flags = {"model_name_or_path": "m", "output_dir": "o", "dataset_name": data, "token_cache": cache} | given
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return kind(*parse(argv, classes(kind), prog="x"))


def plainly(run: DPOOptionSet, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, list[Any]], str, str]:
    """Pairs, digest of their ids and of their tokens by a plain loop, as it was before there was a preparation."""
    train, held_out = load_splits(run.data)
    splits = {"train_dataset": first_rows(train, run.train.max_train_samples)}
    if run.train.eval_sets:
        for name, source in run.train.named_sets:
            splits[f"eval_dataset.{name}"] = load_held_out(DataOptions(source))
    elif run.train.eval_strategy != "no":
        splits["eval_dataset"] = held_out
    found = {}
    for name, rows in splits.items():
        pairs = tokenize_rows([rendered(row, run.text, tokenizer) for row in rows], tokenizer)
        groups = [number for number, row in enumerate(as_rows(rows)) for _ in row]
        found[name] = [
            pair
            | {column: row[column] for column in ("pair_id", "weight", "margin") if column in row}
            | ({"group": group} if any("group" in each for each in rows) else {})
            for pair, row, group in zip(pairs, rows, groups, strict=True)
            if len(pair["prompt_ids"]) < run.text.limit
        ]
    return found, sha256_json([row["pair_id"] for row in splits["train_dataset"]]), token_hash(found)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, so that a few rows are many chunks."""
    monkeypatch.setattr(chunks, "CHUNK", 7)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("given", [
    {}, {"use_chat_template": "false"}, {"max_prompt_length": 20}, {"max_length": 24},
    {"val_ratio": 0.3, "eval_strategy": "steps", "eval_steps": 5},
])  # fmt: skip
@pytest.mark.parametrize("shape", ROWS)
def test_the_tokens_are_those_of_a_plain_loop(
    shape: str, given: dict[str, Any], processes: int, many: None, tmp_path: Path
):
    data = tiny.save_pairs(tmp_path / "rows.jsonl", ROWS[shape])
    tokenizer = tiny.tokenizer()
    run = run_of(data, tmp_path / "cache", dataset_num_proc=processes, **given)
    if shape == "several turns" and "max_prompt_length" in given:
        pytest.skip("the tiny template has no room for it")
    expected, pairs, tokens = plainly(run, tokenizer)
    for _ in range(2):  # made, and found
        got = training_data(run, tokenizer)
        assert {name: list(rows) for name, rows in got.splits.items()} == expected
        assert (got.pairs, got.tokens) == (pairs, tokens)
    assert got.splits["train_dataset"].data.schema.field("prompt_ids").type.value_type == "int32"


def test_sets_to_evaluate_on_are_prepared_with_the_run(tmp_path: Path):
    data, texts, lists = (tiny.save_pairs(tmp_path / f"{name}.jsonl", ROWS[name]) for name in ("hh", "text", "lists"))
    given = {"eval_strategy": "steps", "eval_steps": 5, "eval_sets": f"t={texts}"}
    tokenizer = tiny.tokenizer()
    for sets in ({}, {"eval_sets": f"other={lists}"}, {"eval_sets": f"t={lists}"}, {}):
        run = run_of(data, tmp_path / "cache", **given | sets)
        got, expected = training_data(run, tokenizer), plainly(run, tokenizer)
        assert (ids_of(got), got.pairs, got.tokens) == expected
    other(texts, "Say 7", "Say 3")
    run = run_of(data, tmp_path / "cache", **given)
    assert ids_of(training_data(run, tokenizer)) == plainly(run, tokenizer)[0]


def ids_of(data: TrainingData) -> dict[str, list[Any]]:
    return {name: list(rows) for name, rows in data.splits.items()}


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the pairs that were tokenized, as they come."""
    made: list[str] = []
    make = PairMaker.make

    def watched(self: PairMaker, row: Any, counts: Any) -> Any:
        made.append(row["pair_id"])
        return make(self, row, counts)

    monkeypatch.setattr(PairMaker, "make", watched)
    return made


def other(data: Path, old: str, new: str) -> None:
    """Other bytes in a file of the same size and dates."""
    before, content = data.stat(), data.read_text()
    assert old in content and len(old) == len(new)
    data.write_text(content.replace(old, new))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_tokenized_twice_and_nothing_stale_is_found(tokenized: list[str], tmp_path: Path):
    """Each change of what the tokens are made of makes them anew; each change of anything else finds them."""
    data, tokenizer = tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(12)), tiny.tokenizer()

    def made(**given: Any) -> int:
        tokenized.clear()
        run = run_of(data, tmp_path / "cache", **given)
        expected, *digests = plainly(run, tokenizer)
        got = training_data(run, tokenizer)
        assert (ids_of(got), got.pairs, got.tokens) == (expected, *digests)
        return len(tokenized)

    assert made() == 12
    for same in ({}, {"learning_rate": 1e-3, "output_dir": "b"}, {"seed": 3}, {"beta": 0.3}, {"dataset_num_proc": 1}):
        assert made(**same) == 0
    data.touch()
    assert made() == 0
    assert made(max_length=40) == 12
    assert made(max_prompt_length=20) == 12
    assert made(use_chat_template="false") == 12
    assert made(max_train_samples=5) == 5
    assert made(val_ratio=0.5) < 12
    assert made(val_ratio=0.5, data_seed=1) > 0
    assert made() == 0
    other(data, "cat", "mat")
    assert made() == 12
    tokenizer.chat_template = tiny.TEMPLATE.replace("<|", "< |")
    assert made() == 12
    tokenizer.chat_template = tiny.TEMPLATE
    tokenizer.add_tokens(["better"])
    assert made() == 12
    tokenizer.eos_token = "<s>"
    assert made() == 12
    tokenizer = tiny.tokenizer()
    assert made() == 0


@pytest.mark.parametrize("code", ["data/tokenized.py", "data/templates/plain.jinja"])
def test_other_code_is_another_key(code: str, tmp_path: Path):
    """The installed package with one file changed."""
    package = Path(chunks.__file__).parents[1]
    copy = tmp_path / "tandem"
    shutil.copytree(package, copy)
    told = []
    for _ in range(2):
        line = "from tandem.data.content import code_content; print(code_content())"
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        told.append(subprocess.check_output([sys.executable, "-c", line], env=environment, text=True, cwd=tmp_path))
        (copy / code).write_text((copy / code).read_text() + "\n")
    assert told[0] != told[1]


def test_a_template_that_tells_the_time_and_code_of_ones_own_keep_nothing(tokenized: list[str], tmp_path: Path):
    run = run_of(tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(4)), tmp_path / "cache")

    class Own(type(tiny.tokenizer())):  # type: ignore[misc]
        pass

    telling, own = tiny.tokenizer(tiny.TEMPLATE + "{% if false %}{{ strftime_now('%H') }}{% endif %}"), tiny.tokenizer()
    own.__class__ = Own
    for tokenizer, _ in itertools.product((telling, own), range(2)):
        tokenized.clear()
        assert ids_of(training_data(run, tokenizer)) == plainly(run, tokenizer)[0]
        assert len(tokenized) == 4
    assert not (tmp_path / "cache").exists()


def test_what_is_said_of_the_rows_is_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    long = {side: f"\n\nHuman: {'word ' * 40}\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    rows = [*tiny.hh_rows(12), {"chosen": "x", "rejected": 3}, long]
    data = tiny.save_pairs(tmp_path / "rows.jsonl", [row | {"note": str(n)} for n, row in enumerate(rows)])
    run = run_of(data, tmp_path / "cache", max_bad_rows=1, max_length=100)
    said = []
    for _ in range(2):
        caplog.clear()
        training_data(run, tiny.tokenizer(tiny.TEMPLATE.replace("eos_token", "'.'")))
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        said.append((capsys.readouterr().err, warned))
    assert said[0] == said[1]
    assert "skipped" in said[0][0] and "NOT read: note" in said[0][0]
    assert any("left out: the prompt alone fills --max_length" in line for line in said[0][1])
    assert any("that no special token ends" in line for line in said[0][1])


def damage_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [
    lambda folder: damage_byte(folder / "train_dataset.arrow"),
    lambda folder: damage_byte(folder / "set.json"),
    lambda folder: os.truncate(folder / "train_dataset.arrow", 100),
    lambda folder: (folder / "train_dataset.arrow").unlink(),
    lambda folder: (folder / "set.json").unlink(),
])  # fmt: skip
def test_a_damaged_set_is_made_anew(harm: Callable[[Path], None], tokenized: list[str], tmp_path: Path):
    run = run_of(tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(12)), tmp_path / "cache")
    first = ids_of(training_data(run, tiny.tokenizer()))
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    harm(folder)
    tokenized.clear()
    assert ids_of(training_data(run, tiny.tokenizer())) == first
    assert len(tokenized) == 12
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [folder]


def test_data_that_changes_while_it_is_read_is_not_kept(tmp_path: Path):
    data = tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(12))
    run = run_of(data, tmp_path / "cache")
    written, changes = data.read_text(), 100

    def read() -> dict[str, list[Row]]:
        nonlocal changes
        rows = {TRAIN: load_training(run.data)}
        if changes:
            data.write_text(written if data.read_text() != written else written.replace("cat", "mat"))
            changes -= 1
        return rows

    rows = Rows(read, lambda: data_content(run.data, training=True, held_out=False))
    maker = PairMaker(tiny.tokenizer(), run.text)
    with pytest.raises(UserError, match="the data changes while it is read"):
        prepare(rows, maker, [], run.train)
    data.write_text(written)
    changes = 1  # the first reading is of other rows than the file has then, the second is right
    found = prepare(rows, maker, [], run.train)
    assert found.tokens == plainly(run_of(data, tmp_path / "elsewhere"), tiny.tokenizer())[2]


class User:
    """A process that uses a set, which it builds in so many seconds where there is none."""

    def __init__(self, folder: Path, key: str, limit: int = 10**9, seconds: float = 0.0) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=self._use, args=(folder, key, limit, seconds, end))
        self.process.start()

    def _use(self, folder: Path, key: str, limit: int, seconds: float, pipe: Any) -> None:
        def build(place: Path) -> dict[str, Any]:
            pipe.send("builds")
            time.sleep(seconds)
            table = pa.table({"x": list(range(1000))})
            with pa.OSFile(str(place / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return {}

        found = TokenCache(folder, limit).get(key, build)
        pipe.send(found.tables["rows"]["x"].to_pylist() == list(range(1000)))
        pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def test_what_was_unused_for_the_longest_time_goes_but_nothing_in_use(tmp_path: Path):
    """Sets a to d of over 8,000 bytes, of which a is the oldest and stays in use; there is room for three."""
    users = []
    for key in "abcd":
        users.append(User(tmp_path / "cache", key, limit=3 * 9000))
        assert (users[-1].pipe.recv(), users[-1].pipe.recv()) == ("builds", True)
        if key in "bc":
            users[-1].end()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()) == ["a", "c", "d"]
    for user in users:
        user.end()


def test_the_folder_of_sets_and_its_size(tmp_path: Path):
    cache, one, other = (tmp_path / name for name in ("cache", "one.jsonl", "other.jsonl"))
    training_data(run_of(tiny.save_pairs(one, TEXTS), cache), tiny.tokenizer())
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    unused = shutil.copytree(kept, cache / ("0" * 32))
    training_data(run_of(tiny.save_pairs(other, TEXTS[1:]), cache, token_cache_gib=0), tiny.tokenizer())
    assert kept.is_dir() and not unused.exists()


def test_one_process_makes_it_and_a_killed_one_leaves_nothing(tmp_path: Path):
    """A process is killed at its work; of two that go on, one does it and the other waits, then maps the same."""
    killed = User(tmp_path, "a", seconds=30)
    assert killed.pipe.recv() == "builds"
    users = [User(tmp_path, "a", seconds=0.2) for _ in range(2)]
    time.sleep(0.1)
    killed.end()
    first = sorted(str(user.pipe.recv()) for user in users)
    assert first == ["True", "builds"]
    assert [user.pipe.recv() for user in users if user.pipe.poll(0.3)] == [True]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["a"]
    for user in users:
        user.end()


def test_as_many_processes_as_are_asked_for(many: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each writes its number where it works; they end with the preparation."""
    run = run_of(tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(60)), tmp_path / "cache", dataset_num_proc=3)
    make, seen = PairMaker.make, tmp_path / "seen"
    seen.mkdir()

    def noted(self: PairMaker, row: Any, counts: Any) -> Any:
        (seen / str(os.getpid())).touch()
        time.sleep(0.01)
        return make(self, row, counts)

    monkeypatch.setattr(PairMaker, "make", noted)
    training_data(run, tiny.tokenizer())
    numbers = {int(path.name) for path in seen.iterdir()}
    assert len(numbers) == 3 and os.getpid() not in numbers
    assert not any(map(psutil.pid_exists, numbers))


def test_a_worker_that_dies_is_told(many: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = run_of(tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(60)), tmp_path / "cache", dataset_num_proc=2)
    monkeypatch.setattr(PairMaker, "make", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a process that tokenizes was killed"):
        training_data(run, tiny.tokenizer())
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_unwritable_folder_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, cache = tiny.save_pairs(tmp_path / "rows.jsonl", tiny.hh_rows(4)), tmp_path / "file"
    cache.write_text("")
    run = run_of(data, cache)
    assert ids_of(training_data(run, tiny.tokenizer())) == plainly(run, tiny.tokenizer())[0]
    assert "so tokens are kept for this run alone" in capsys.readouterr().err
