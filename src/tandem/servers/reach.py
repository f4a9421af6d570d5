"""Whether anybody listens at a server's address: tried once, before requests are repeated in vain."""

import socket
import urllib.request
from urllib.parse import urlsplit

from tandem.errors import UserError
from tandem.servers.address import CONNECT_TIMEOUT


class Unreachable(UserError):
    """Nobody listens at the address."""


def refuse_unreachable(url: str) -> None:
    """Connect once and hang up. Where requests go through a proxy, nothing is tried.

    Raises:
        Unreachable: the host has no address, refuses the connection, or does not answer in CONNECT_TIMEOUT seconds.
    """
    parts = urlsplit(url)
    host = str(parts.hostname)
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), CONNECT_TIMEOUT).close()
    except UnicodeError:  # as of 127.0.0..1
        raise Unreachable(f"--base_url {url}: {host} is no name of a host; see the address") from None
    except OSError as error:
        raise Unreachable(
            f"--base_url {url} does not answer ({error.strerror or error}): start the server, or see the address"
        ) from None
