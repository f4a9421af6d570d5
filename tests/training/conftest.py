"""What the tests of finished and stored runs have in common."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Run = Callable[..., None]


@pytest.fixture
def run_dpo_script(script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path: Path) -> Run:
    """`run_dpo_script(folder, flag=value, …)`: a DPO run of few steps in this process, with a cache of its test."""

    def run(out: Path, **flags: Any) -> None:
        options: dict[str, Any] = {
            "model_name_or_path": tiny_model,
            "dataset_name": tiny_data,
            "ref_cache": tmp_path / "cache",
            "output_dir": out,
            "bf16": "false",
            "per_device_train_batch_size": 4,
        } | flags
        script("dpo").main([part for name, value in options.items() for part in (f"--{name}", str(value))])

    return run
