"""What a launcher tells a process is read in one place."""

import os
import re
from pathlib import Path

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
