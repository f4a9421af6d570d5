"""OpenAI-compatible servers: their addresses, and the key, which is only ever read from the environment."""

import dataclasses
import os
import re
from urllib.parse import parse_qsl, urlencode, urlsplit

from tandem.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
API_KEY_VARIABLE = "OPENAI_API_KEY"
BASE_URL_VARIABLE = "OPENAI_BASE_URL"
CONNECT_TIMEOUT = 10.0  # seconds; that nobody listens at an address should show long before a reply would time out
ROUTES = {"responses": "/responses", "chat": "/chat/completions"}  # by form of the request
_VERSION = re.compile(r"/v\d+\w*(?:/|$)|/deployments/")  # a path with one of these already leads to the interface


@dataclasses.dataclass(frozen=True)
class Address:
    """A --base_url taken apart."""

    base: str  # without the route, the query and a slash at its end
    form: str | None  # responses or chat, where the address ends in the route of one
    query: dict[str, str]  # Azure's api-version

    @property
    def bases(self) -> list[str]:
        """Addresses under which the interface may be found: as given, and with /v1 if it names no version."""
        return [self.base] if _VERSION.search(urlsplit(self.base).path) else [self.base, f"{self.base}/v1"]


def parse_address(url: str) -> Address:
    """The parts of an address that `checked_url` has accepted."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    form = next((name for name, route in ROUTES.items() if path.endswith(route)), None)
    if form is not None:
        path = path.removesuffix(ROUTES[form]).rstrip("/")
    return Address(parts._replace(path=path, query="").geturl(), form, dict(parse_qsl(parts.query)))


def checked_url(url: str) -> str:
    """The value of --base_url without white space around it and a slash at its end.

    Raises:
        UserError: it is not an http address, or holds credentials, which would get into files and the report.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--base_url {url}: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--base_url {url}: must start with http:// or https:// and name a host")
    query = parse_qsl(parts.query, keep_blank_values=True)
    if parts.username or parts.password or any(name != "api-version" for name, _ in query):
        raise UserError(
            "--base_url must hold no credentials, and no query but Azure's ?api-version=; put the key into "
            f"${API_KEY_VARIABLE}"
        )
    return parts._replace(path=parts.path.rstrip("/"), query=urlencode(query), fragment="").geturl()


def default_url() -> str | None:
    """The address that the environment names, or None."""
    return os.environ.get(BASE_URL_VARIABLE, "").strip() or None


def api_key(url: str) -> str | None:
    """The key for the server at `url`, without white space around it; None where none is set.

    Raises:
        UserError: none is set for OpenAI's own server, or a request's header cannot carry it.
    """
    key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    if key is None and url.startswith(OPENAI_URL):
        raise UserError(f"${API_KEY_VARIABLE} is not set: {OPENAI_URL} needs a key; or name another --base_url")
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"${API_KEY_VARIABLE} holds white space or a character that is not ASCII, which no request can carry: "
            "copy the key once more"
        )
    return key
