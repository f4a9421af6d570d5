"""Whether a name that may be a path or one on the Hub is a path.

`runs/sft` has the form of a Hub name. Where it is not there, the folder it would be in is what tells the two apart.
"""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
# First parts of a path that people give their folders, and that owners on the Hub hardly have
_FOLDERS = frozenset("run runs out output outputs checkpoint checkpoints model models results result tmp temp".split())  # noqa: SIM905


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one on the Hub, as far as that shows here: neither there nor in a folder that is."""
    return bool(HUB_NAME.fullmatch(name)) and ".." not in name and not Path(name).exists() and _folder_of(name) is None


def not_here(name: str) -> str:
    """What to say of a name that could not be found on the Hub: that there is no such folder, if it could be one."""
    folder = _folder_of(name)
    return (
        ""
        if folder is None or Path(name).exists()
        else f"no such folder in {folder}/, and not to be had from the Hub: "
    )


def _folder_of(name: str) -> str | None:
    """The folder that `name` would be in, if it is here or has such a name."""
    first, slash, _ = name.partition("/")
    return first if slash and (first in _FOLDERS or Path(first).is_dir()) else None
