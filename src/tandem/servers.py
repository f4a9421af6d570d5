"""OpenAI-compatible servers: their addresses, and the key, which is only ever read from the environment."""

import os
from urllib.parse import urlsplit

from tandem.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
API_KEY_VARIABLE = "OPENAI_API_KEY"
CONNECT_TIMEOUT = 10.0  # seconds; an address where nobody listens should not take a whole timeout to show


def checked_url(url: str) -> str:
    """The value of --base_url without a slash at its end.

    Raises:
        UserError: no http address, or one that holds credentials: it goes into files and the report.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise UserError(f"--base_url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--base_url {url}: must start with http:// or https:// and name a host")
    if parts.username or parts.password or parts.query:
        raise UserError(f"--base_url must hold no credentials or query; put the key into ${API_KEY_VARIABLE}")
    return url.rstrip("/")


def api_key(url: str) -> str | None:
    """The key for the server at `url`; None where there is none, and a server of one's own may need none.

    Raises:
        UserError: OpenAI's own server is asked and there is none.
    """
    key = os.environ.get(API_KEY_VARIABLE) or None
    if key is None and url == OPENAI_URL:
        raise UserError(f"${API_KEY_VARIABLE} is not set: {OPENAI_URL} needs a key; or name another --base_url")
    return key
