"""A sharded start holds one copy of the model in host memory and not one a rank."""

from pathlib import Path

import pytest

from bench import loading


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--use_peft", "true"]], ids=["full", "lora"])
def test_eight_ranks_hold_one_copy(tmp_path: Path, flags: list[str]):
    """Of 300M random bfloat16 weights, trained in float32: each rank that loads them adds a copy."""
    found = loading.measure(tmp_path, 8, 24, 1024, [*flags, "--dtype", "float32"])
    print({name: round(value, 3) for name, value in found.items()})
    assert found["loaded"] < 1.3
    # While the file is read, its pages are mapped beside the weights: at most half a copy, and the kernel can drop them
    assert found["loading_anon"] < 1.3 and found["loading"] < 1.3 + 0.5
    assert found["sharding"] < 2.4
