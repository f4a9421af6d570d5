"""Tells paths from names on the Hub.

`runs/sft` has the form of a Hub name. Where there is no such path, it counts as a missing path, and not as a Hub name,
if `runs` is a folder here or a name that people give to folders.
"""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# First parts of paths that people use for folders, and that hardly anybody on the Hub is called
_FOLDERS = frozenset("run runs out output outputs checkpoint checkpoints model models results result tmp temp".split())  # noqa: SIM905


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a Hub name and is not a path, as said above."""
    return bool(HUB_NAME.fullmatch(name)) and ".." not in name and not Path(name).exists() and _folder_of(name) is None


def not_here(name: str) -> str:
    """How an error about a name that the Hub does not have begins: that it may be a missing folder; else empty."""
    folder = _folder_of(name)
    return (
        ""
        if folder is None or Path(name).exists()
        else f"no such folder in {folder}/, and not to be had from the Hub: "
    )


def _folder_of(name: str) -> str | None:
    """The folder that `name` would be in, if that is here or has a folder's usual name; else None."""
    first, slash, _ = name.partition("/")
    return first if slash and (first in _FOLDERS or Path(first).is_dir()) else None
