"""--token_budget on two processes: as many parts on both, and what is computed stays."""

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launches import run
from tests.distributed.test_balance import check_same, flags, uneven_data  # noqa: F401
from tests.distributed.test_sharded_equality import margins_of


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_parts_on_two_processes(launch: str, tiny_model: Path, uneven_data: Path, tmp_path: Path):  # noqa: F811
    """The last step, whose metrics accelerate cuts, is left out of the counts of tokens."""
    more = f"--ref_cache {tmp_path / 'cache'} --per_device_train_batch_size 4 --gradient_accumulation_steps 1"
    whole, parts = (flags(tiny_model, uneven_data, tmp_path / name, more) for name in ("whole", "parts"))
    said = run(launch, 2, ["dpo.py", *parts, "--token_budget", "500"], ["dpo.py", *whole])
    assert "in parts of as many pairs each, of 500 tokens at most" in said
    check_same(tmp_path / "parts", tmp_path / "whole", tiny_model)
    for mine, its in zip(margins_of(tmp_path / "parts"), margins_of(tmp_path / "whole"), strict=True):
        assert mine["pair_id"].tolist() == its["pair_id"].tolist()
        np.testing.assert_allclose(mine["margin"], its["margin"], rtol=1e-4, atol=1e-4)
