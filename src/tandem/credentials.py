"""Keys, tokens and passwords: known by their variables and by their looks, and hidden wherever text leaves a run."""

import json
import os
import re
from typing import Any

# AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_KEY, PGPASSWORD, MYSQL_PWD; not TOKENIZERS_PARALLELISM or AWS_ACCESS_KEY_ID
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASS|PWD|PASSPHRASE|CREDENTIALS?|SAS)$|PASSWORD$|PASSWD$")
# A folder and its parts are no secrets, and every message would lose them
_IS_PATH = re.compile(r"[./~]")
_SHORTEST = 8  # characters; a shorter value is a placeholder, and could be part of any word
_NO_WORD = 16  # letters; a shorter key of letters alone is a word, which a reply may hold
_FORM = ("type", "object", "role", "status", "finish_reason", "reason")  # of a reply, whose words the interface sets
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,})")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def hide(text: str) -> str:
    """`text` with [hidden] in the place of everything that is a key, a token, or the user and password of a URL."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not _is_path(value):
            text = text.replace(value, "[hidden]")
    return _USER_OF_URL.sub("[hidden]", _TOKEN.sub("[hidden]", text))


def hide_key(reply: str, key: str | None) -> str:
    """A server's reply with [key] in the place of the key it was asked with, should it repeat that in a text.

    The form of the reply stays: names of fields and the interface's own words are not touched, and no placeholder that
    a local server is given for a key (`x`, `token`, `assistant`) is looked for.
    """
    if not key or len(key) < _SHORTEST or (key.isalpha() and len(key) < _NO_WORD) or key not in reply:
        return reply
    whole = re.compile(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])")
    try:
        return json.dumps(_without(json.loads(reply), whole), ensure_ascii=False)
    except ValueError:  # no JSON, such as an error's page
        return whole.sub("[key]", reply)


def _without(value: Any, key: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return key.sub("[key]", value)
    if isinstance(value, list):
        return [_without(each, key) for each in value]
    if isinstance(value, dict):
        return {name: each if name in _FORM else _without(each, key) for name, each in value.items()}
    return value


def _is_path(value: str) -> bool:
    return _IS_PATH.match(value) is not None and os.path.exists(os.path.expanduser(value))


def names_secret(variable: str) -> bool:
    """Whether the environment variable of this name holds a key or token."""
    return _VARIABLE.search(variable) is not None


def holds_secret(text: str) -> bool:
    """Whether `hide` would hide any of `text`."""
    return hide(text) != text
