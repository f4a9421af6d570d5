"""The folder of token ids where it is not this user's alone."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.data.pairs import PairMaker
from tandem.training.preparation import training_data
from tests import tiny
from tests.training.test_preparation import TEXTS, ids_of, plainly, run_of


def test_nothing_is_removed_that_the_cache_has_not_made(tmp_path: Path):
    cache = tmp_path / "cache"
    for name in ("film.part/first", "work/set.json", "notes.part"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("precious")
    leftover = cache / f".{'0' * 32}.{'1' * 32}.part"
    leftover.mkdir()
    training_data(run_of(tiny.save_pairs(tmp_path / "t.jsonl", TEXTS), cache, token_cache_gib=0), tiny.tokenizer())
    for name in ("film.part/first", "work/set.json", "notes.part"):
        assert (cache / name).read_text() == "precious"
    assert not leftover.exists()


def test_a_home_that_cannot_be_found_is_no_reason_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tiny.save_pairs(tmp_path / "t.jsonl", TEXTS), "~no_such_user/cache")
    assert ids_of(training_data(run, tiny.tokenizer())) == plainly(run, tiny.tokenizer())[0]
    assert "so tokens are kept for this run alone" in capsys.readouterr().err


def in_fork(work: Callable[[], str]) -> str:
    """What `work` gives in a process of its own, whose locks go with it."""
    pipe, end = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: end.send(work()))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    told: str = pipe.recv()
    return told


def whole(folder: Path) -> None:
    """A set as it is."""


def harmed(folder: Path) -> None:
    """A set that is damaged."""
    os.truncate(folder / "train_dataset.arrow", 100)
    (folder.parent / f".{folder.name}.used").unlink()


def gone(folder: Path) -> None:
    """A builder's lock without a set."""
    shutil.rmtree(folder)
    (folder.parent / f".{folder.name}.used").unlink()
    (folder.parent / f".{folder.name}.build").write_text("")


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("harm", [whole, harmed, gone])
def test_sets_of_another_user_are_read_and_are_no_reason_to_stop(harm: Callable[[Path], None], tmp_path: Path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    cache, data = tmp_path / "cache", tiny.save_pairs(tmp_path / "t.jsonl", TEXTS)
    cache.mkdir()
    cache.chmod(0o1777)
    tokens = in_fork(lambda: training_data(run_of(data, cache), tiny.tokenizer()).tokens)
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    harm(kept)

    def use() -> str:
        os.setuid(54321)
        if harm is whole:
            PairMaker.make = None  # type: ignore[assignment, method-assign]  # nothing may be built
        return training_data(run_of(data, cache), tiny.tokenizer()).tokens

    assert in_fork(use) == tokens
