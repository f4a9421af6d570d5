"""The end of a program: one line and an exit code."""

import sys

import pytest

from tandem.errors import script_main


def test_windows_is_named_as_not_supported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as stopped:
        script_main(lambda argv: None)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "UserError: Tandem does not run on Windows; use WSL 2 (docs/troubleshooting.md)\n"
