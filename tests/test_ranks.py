"""What a launcher tells a process is read in one place."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tandem import ranks

SOURCE = Path(__file__).parents[1] / "src" / "tandem"
# The second lists variables for users, and reads none
ALLOWED = {SOURCE / "ranks.py", SOURCE / "options" / "parsing.py"}


def test_no_other_module_reads_a_launchers_variables():
    variable = re.compile(r"""["'](?:LOCAL_|GROUP_)?(?:RANK|WORLD_SIZE)["']""")
    assert {path for path in SOURCE.rglob("*.py") if variable.search(path.read_text())} == ALLOWED


def test_a_count_is_taken_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.as_if(3):
        assert ranks.count() == 3
    assert ranks.count() == 1 and "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with ranks.as_if(3):
        assert ranks.count() == 3
    assert ranks.count() == 2


def test_a_process_without_a_launcher_is_alone():
    assert (ranks.count({}), ranks.count_here({}), ranks.has_launcher({})) == (1, 1, False)
    launched = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    assert (ranks.count(launched), ranks.count_here(launched), ranks.has_launcher(launched)) == (8, 4, True)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(
    ("first", "is_orphan"),
    [
        (b"/sbin/init\0splash\0", True),
        (b"sleep\0infinity\0", True),
        (b"/usr/bin/python\0/usr/local/bin/accelerate\0launch\0scripts/dpo.py\0", False),
        (b"/usr/bin/python3\0/usr/bin/torchrun\0--nproc_per_node\08\0scripts/dpo.py\0", False),
        (b"python\0-m\0torch.distributed.run\0scripts/dpo.py\0", False),
        (b"python\0-m\0tandem.launch\0--config_file\0ddp.yaml\0", False),
    ],
)
def test_an_orphan_ends_and_a_child_of_a_containers_first_process_does_not(
    first: bytes, is_orphan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "cmdline").write_bytes(first)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(ranks, "FIRST_PROCESS", tmp_path / "cmdline")
    monkeypatch.setattr("os.getppid", lambda: 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(prctl=lambda *given: asked.append(given)))
    with pytest.raises(SystemExit) if is_orphan else contextlib.nullcontext():
        ranks.end_with_launcher()
    assert asked == [(1, signal.SIGKILL)]
