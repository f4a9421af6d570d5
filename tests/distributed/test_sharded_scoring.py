"""Scoring and generation with a model that FSDP shards over two processes leave the files of one process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.loading import save_model
from tandem.errors import UserError
from tandem.models.shards import check_adapter
from tests import tiny
from tests.adapters import save_kind
from tests.distributed import capped, launches


def flags(**options: Any) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]


def test_two_shards_score_and_answer_as_one_whole(
    script: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path
):
    """An odd number of batches: in the last turn one process works for the other's sake. Among the models is an
    adapter, and the base's head is tied."""
    adapter = save_kind(tmp_path / "adapter", tiny_model, "lora")
    data = tiny.save_pairs(tmp_path / "test.jsonl", tiny.hh_rows(7))

    def commands(folder: Path) -> dict[str, list[str]]:
        measured = {
            "kl_prompts": 3,
            "kl_max_new_tokens": 5,
            "eval_batch_size": 3,
            "output_file": folder / "results.json",
        }
        answered = {"models": f"base={tiny_model} dpo={adapter}", "max_new_tokens": 5, "batch_size": 3}
        models = {"reference_model": tiny_model, "dpo_model": adapter}
        return {
            "evaluate": flags(**models, dataset_name=data, **measured),
            "generate": flags(dataset_name=data, output_dir=folder, **answered),
        }

    for name, argv in commands(tmp_path / "one").items():
        script(name).main(argv)
    launches.run("fsdp", 2, *([f"{name}.py", *argv] for name, argv in commands(tmp_path / "two").items()), kind="cpu")
    for name in ("results.json", "generations_base.jsonl", "generations_dpo.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_a_model_larger_than_a_process_may_hold(tmp_path: Path):
    """1.2 GiB of float32; each process may hold 1.1 GiB."""
    model = save_model(tmp_path / "model", 24, 1024)
    data = tiny.save_pairs(tmp_path / "test.jsonl", tiny.hh_rows(4))
    models = {"reference_model": model, "dpo_model": model, "dataset_name": data, "eval_bf16": "false"}
    small = {"eval_batch_size": 2, "kl_prompts": 2, "kl_max_new_tokens": 3}
    capped_run = [str(Path(capped.__file__)), "1126", "evaluate.py"]

    def argv(name: str) -> list[str]:
        return flags(**models, **small, output_file=tmp_path / f"{name}.json")

    alone = launches.start([sys.executable, *capped_run, *argv("capped")], {})
    assert alone.returncode == capped.EXIT_CODE, alone.stderr[-2000:]
    assert not (tmp_path / "capped.json").exists()
    sharded = launches.start([*launches.launcher("fsdp", 2), *capped_run, *argv("sharded")], {})
    assert sharded.returncode == 0, sharded.stderr[-2000:]
    whole = launches.start([sys.executable, capped_run[0], "100000", "evaluate.py", *argv("whole")], {})
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert json.loads((tmp_path / "sharded.json").read_text()) == json.loads((tmp_path / "whole.json").read_text())


@pytest.mark.parametrize("kind", ["dora", "loha", "embeddings", "saved_modules", "pissa"])
def test_an_adapter_that_needs_its_base_whole_is_refused(kind: str, tiny_model: Path, tmp_path: Path):
    adapter = save_kind(tmp_path / kind, tiny_model, kind)
    with pytest.raises(UserError, match=r"needs its base whole, and FSDP shards it: merge the adapter first"):
        check_adapter(str(adapter))
