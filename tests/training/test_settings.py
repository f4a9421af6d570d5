"""What a run notes of the machine it is on."""

from importlib import metadata

import pytest

import tandem
from tandem.training.settings import environment


def test_tandems_version_is_its_own_and_not_a_strangers(monkeypatch: pytest.MonkeyPatch):
    """PyPI's `tandem` is another project: an installation has none of that name, or the wrong one."""
    installed = metadata.version

    def version(name: str) -> str:
        if name == "tandem":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    assert environment()["versions"]["tandem"] == tandem.__version__
