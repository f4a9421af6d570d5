"""The files of a model's folder: their names, an adapter's configuration, and the index of weights in several files."""

import json
from pathlib import Path
from typing import Any

from tandem.errors import UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of the adapter in `folder`, as PEFT wrote it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return dict(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: {ADAPTER_CONFIG} cannot be read: {first_line(error)}") from error


def indexed_files(folder: str | Path) -> set[str] | None:
    """The files that the folder's index names; None where it has none, and its weights are one file.

    Raises:
        UserError: the file cannot be read as an index.
    """
    index = Path(folder) / INDEX
    if not index.is_file():
        return None
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from error
