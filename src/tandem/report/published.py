"""A model's files as they are pushed: without paths of this machine, and in place of what an earlier push left."""

import json
import re
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.places import is_hub_name

# Files of an earlier push that from_pretrained would load instead of, or beside, those that are pushed now
_LOADED = re.compile(
    r"(?:adapter_|model|pytorch_model|tf_model|flax_model)[^/]*\.(?:json|safetensors|bin|h5|msgpack)"
    r"|(?:generation_|tokenizer_|preprocessor_|processor_)?config\.json|tokenizer\.(?:json|model)|spiece\.model"
    r"|vocab\.(?:json|txt)|merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template\.(?:jinja|json)"
)
_PATH = re.compile(r"(?:/[\w.@+-]+){2,}/?|(?:~|\.\.?|[A-Za-z]:)[\\/]\S+|file://\S+")
_NAMES_OF_A_PLACE = ("_name_or_path", "name_or_path")  # entries with the path or name that transformers loaded from


def would_be_loaded(name: str) -> bool:
    """Whether from_pretrained would load a file of that name in a repository."""
    return _LOADED.fullmatch(name) is not None


def configuration(file: Path) -> bytes | Path:
    """A configuration's file, or its content without the entries that are paths of this machine, if there are any.

    Raises:
        UserError: it is not JSON.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    public = without_places(config)
    return file if public == config else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def without_places(value: Any) -> Any:
    """A JSON value without entries of objects that are paths, or names of models that are not on the Hub."""
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: without_places(one) for name, one in value.items() if not _is_place(name, one)}


def _is_place(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return _PATH.fullmatch(value) is not None or (name in _NAMES_OF_A_PLACE and value != "" and not is_hub_name(value))
