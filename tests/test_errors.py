"""The end of a program: one line and an exit code."""

import sys
from pathlib import Path

import pytest

from tandem.errors import script_main
from tandem.servers.reach import Unreachable


def test_windows_is_named_as_not_supported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: None)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "UserError: Tandem does not run on Windows; use WSL 2 (docs/troubleshooting.md)\n"


@pytest.mark.parametrize("place", ["file", "file/x"])
def test_a_file_where_a_folder_is_wanted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: (tmp_path / place).mkdir())
    assert stopped.value.code == 2
    said = "a file stands where a folder is wanted; put that right, or name another place"
    assert capsys.readouterr().err == f"UserError: {tmp_path / place}: {said}\n"


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: Path("/dev/full").write_text("x" * 9))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "UserError: No space left on device; put that right, or name another place\n"


def test_errors_go_by_the_name_of_their_kind(capsys: pytest.CaptureFixture[str]):
    def main(argv: list[str]) -> None:
        raise Unreachable("nobody listens")

    with pytest.raises(SystemExit):
        script_main(main)
    assert capsys.readouterr().err == "UserError: nobody listens\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        script_main(lambda argv: Path("/nowhere/at/all").read_text())
