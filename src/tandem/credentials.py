"""Keys, tokens and passwords: known by their variables and by their looks, and hidden wherever text leaves a run."""

import os
import re

# AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_KEY, PGPASSWORD, MYSQL_PWD; not TOKENIZERS_PARALLELISM or AWS_ACCESS_KEY_ID
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASS|PWD|PASSPHRASE|CREDENTIALS?|SAS)$|PASSWORD$|PASSWD$")
# A folder and its parts are no secrets, and every message would lose them
_IS_PATH = re.compile(r"[./~]")
_SHORTEST = 8  # characters; a shorter value is a placeholder, and could be part of any word
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,})")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def hide(text: str) -> str:
    """`text` with [hidden] in the place of everything that is a key, a token, or the user and password of a URL."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not _is_path(value):
            text = text.replace(value, "[hidden]")
    return _USER_OF_URL.sub("[hidden]", _TOKEN.sub("[hidden]", text))


def _is_path(value: str) -> bool:
    return _IS_PATH.match(value) is not None and os.path.exists(os.path.expanduser(value))


def names_secret(variable: str) -> bool:
    """Whether the environment variable of this name holds a key or token."""
    return _VARIABLE.search(variable) is not None


def holds_secret(text: str) -> bool:
    """Whether `hide` would hide any of `text`."""
    return hide(text) != text
