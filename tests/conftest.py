"""What the tests share: no network, one thread, and a tiny model made once."""

import os

# Before any test imports a library that reads them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["TANDEM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; not to be written to."""
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (32 pairs) and test.jsonl (8); not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    tiny.save_pairs(folder / "train.jsonl", tiny.hh_rows(32))
    tiny.save_pairs(folder / "test.jsonl", tiny.hh_rows(8, start=32))
    return folder


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """`script("dpo").main(argv)`: a script of scripts/, run in this process."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
            assert spec and spec.loader
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return load
