"""Evaluation and generation on two processes leave the files of one process, byte for byte; what cannot be shared is
refused by name."""

import time
from pathlib import Path
from typing import Any

import pytest

from tandem.runs import read_jsonl
from tests import tiny
from tests.distributed.ranks import ranks_of, script, start, torchrun

Finished = tuple[int, str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd number of held-out prompts, so that the last turn has work for one process only."""
    folder = tmp_path_factory.mktemp("held_out")
    tiny.save_pairs(folder / "train.jsonl", tiny.hh_rows(2))
    tiny.save_pairs(folder / "test.jsonl", tiny.hh_rows(19, start=2))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "policy", seed=1, tied=False)


def end(process: Any) -> Finished:
    screen, _ = process.communicate(timeout=240)
    return process.returncode, screen


def command(name: str, processes: int, **options: Any) -> list[str]:
    argv = [part for option, value in options.items() for part in (f"--{option}", *str(value).split())]
    return torchrun(script(name), *argv, processes=processes)


def test_evaluation(tmp_path: Path, tiny_model: Path, policy: Path, data: Path):
    def evaluated(processes: int) -> dict[str, bytes]:
        folder = tmp_path / str(processes)
        options = {"reference_model": tiny_model, "dpo_model": policy, "dataset_name": data, "eval_batch_size": 3}
        options |= {"kl_prompts": 7, "kl_max_new_tokens": 8, "output_file": folder / "results.json"}
        code, screen = end(start(command("evaluate", processes, **options)))
        assert code == 0, screen
        assert screen.count("held-out pairs") == 1
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".yaml"}

    alone, shared = evaluated(1), evaluated(2)
    assert alone.keys() == {"results.json", "results.md"}
    assert shared == alone


@pytest.mark.slow
def test_generation_goes_on_after_a_kill(tmp_path: Path, tiny_model: Path, policy: Path, data: Path):
    def options(folder: Path) -> dict[str, Any]:
        models = f"base={tiny_model} dpo={policy}"
        return {"models": models, "dataset_name": data, "output_dir": folder, "batch_size": 2, "max_new_tokens": 150}

    names = ("generations_base.jsonl", "generations_dpo.jsonl")
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    code, screen = end(start(command("generate", 1, **options(alone))))
    assert code == 0, screen
    killed = start(command("generate", 2, **options(shared)))
    while not any(read_jsonl(shared / name) for name in names):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.001)
    ranks_of(killed.pid)[1].kill()
    killed.communicate()
    assert killed.returncode != 0
    assert sum(len(read_jsonl(shared / name)) for name in names) < 38
    code, screen = end(start(command("generate", 2, **options(shared))))
    assert code == 0, screen
    for name in names:
        assert len(read_jsonl(alone / name)) == 19
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "asks for FSDP version 1: use accelerate_configs/fsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, which trains only: use accelerate_configs/fsdp"),
    ],
)
def test_other_sharding_is_refused(tmp_path: Path, tiny_model: Path, data: Path, variables: dict[str, str], told: str):
    options = {"models": f"base={tiny_model}", "dataset_name": data, "output_dir": tmp_path / "out"}
    code, screen = end(start(command("generate", 2, **options), **variables))
    assert code == 2
    assert told in screen
    assert not (tmp_path / "out").exists()


def test_comparison_is_one_process(tmp_path: Path, tiny_model: Path, policy: Path, data: Path):
    options = {"base_model": tiny_model, "finetuned_model": policy, "dataset_name": data, "output_dir": tmp_path / "o"}
    code, screen = end(start(command("compare", 2, **options)))
    assert code == 2
    assert "UserError: compare runs as one process, not 2: start it without a launcher" in screen
