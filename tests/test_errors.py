"""The end of a program: one line and an exit code."""

import sys
from pathlib import Path

import pytest

from tandem.errors import script_main


def test_windows_is_named_as_not_supported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: None)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "UserError: Tandem does not run on Windows; use WSL 2 (docs/troubleshooting.md)\n"


@pytest.mark.parametrize(("place", "said"), [("file", "File exists"), ("file/x", "Not a directory")])
def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, said: str
):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: (tmp_path / place).mkdir())
    assert stopped.value.code == 2
    line = f"UserError: {tmp_path / place}: {said}; put that right, or name another place\n"
    assert capsys.readouterr().err == line


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        script_main(lambda argv: Path("/nowhere/at/all").read_text())
