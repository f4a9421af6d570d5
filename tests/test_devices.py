"""Why there is no GPU, in the cases that people meet."""

from pathlib import Path

import pytest
import torch

from tandem import devices

DRIVER_570 = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 14 02:19:35 UTC 2025\n"
DRIVER_OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


@pytest.mark.parametrize(
    ("cuda", "driver", "visible", "said"),
    [
        (None, None, None, "built without CUDA"),
        ("13.0", DRIVER_570, None, r"driver is 570\.86\.15, and torch .* for CUDA 13\.0 needs 580 or newer"),
        ("12.8", DRIVER_570, None, "finds none, though the driver is loaded"),
        ("13.0", DRIVER_OPEN, None, "finds none, though the driver is loaded"),
        ("13.0", None, None, "nvidia-smi must list a GPU"),
        ("13.0", DRIVER_OPEN, "", "CUDA_VISIBLE_DEVICES hides"),
        ("13.0", "something else", None, "though the driver is loaded"),
    ],
)
def test_why_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, driver: str | None, visible: str | None, said: str
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    if driver is not None:
        (tmp_path / "version").write_text(driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(devices.why_no_gpu())
