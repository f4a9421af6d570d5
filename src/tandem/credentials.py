"""Keys, tokens and passwords, recognised by the name of their variable or by their form, and hidden in all that a run
prints or writes."""

import json
import os
import re
from typing import Any

# AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_KEY, PGPASSWORD, MYSQL_PWD; not TOKENIZERS_PARALLELISM or AWS_ACCESS_KEY_ID
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASS|PWD|PASSPHRASE|CREDENTIALS?|SAS)$|PASSWORD$|PASSWD$")
# A variable that holds a path (…_KEY=/home/me/key.pem) is no secret: hiding it would blot out paths in every message
_IS_PATH = re.compile(r"[./~]")
_SHORTEST = 8  # characters; a shorter value is a placeholder, and could be part of any word
_NO_WORD = 16  # letters; a shorter key made of letters alone is taken for a word, which a reply may well contain
_FORM = ("type", "object", "role", "status", "finish_reason", "reason")  # fields whose values the interface defines
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[oprsu]_[A-Za-z0-9]{30,})")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def hide(text: str) -> str:
    """`text` with every key and token, and the user and password of every URL, replaced by [hidden]."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not _is_path(value):
            text = text.replace(value, "[hidden]")
    return _USER_OF_URL.sub("[hidden]", _TOKEN.sub("[hidden]", text))


def hide_key(reply: str, key: str | None) -> str:
    """A server's reply with the key of the request, should the server repeat it in a text, replaced by [key].

    The form of the reply stays: names of fields and the interface's own words are not touched. Placeholders that people
    give a local server as its key (`x`, `token`, `assistant`) are not replaced.
    """
    if not key or len(key) < _SHORTEST or (key.isalpha() and len(key) < _NO_WORD) or key not in reply:
        return reply
    whole = re.compile(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])")
    try:
        return json.dumps(_without(json.loads(reply), whole), ensure_ascii=False)
    except ValueError:  # no JSON, such as an error page in HTML
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
    """Whether an environment variable of this name holds a key or token."""
    return _VARIABLE.search(variable) is not None


def holds_secret(text: str) -> bool:
    """Whether `hide` would hide any of `text`."""
    return hide(text) != text
