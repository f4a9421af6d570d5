"""Asks a server over HTTP. The openai package does the retries, with backoff and Retry-After up to two minutes."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import openai

from tandem.credentials import hide_key
from tandem.errors import UserError
from tandem.servers.address import API_KEY_VARIABLE, CONNECT_TIMEOUT, api_key, parse_address
from tandem.servers.dialects import Form, Request
from tandem.servers.endpoint import Attempt, Endpoint
from tandem.servers.reach import refuse_unreachable


def is_out_of_quota(body: str) -> bool:
    """Whether a server answers 429 because the account's quota is used up, and not because requests come too fast."""
    return "insufficient_quota" in body


_LASTING = (500, 501)  # statuses of failures that may not pass by themselves


def _let_stand(response: Any) -> None:
    """Keep the openai package from repeating a request that would fail again. `response` must have been read."""
    text = response.text
    used_up = response.status_code == 429 and is_out_of_quota(text)
    # 501 is "not implemented"; llama-cpp-python's server answers 500 to a parameter that it refuses
    if used_up or response.status_code == 501 or (response.status_code == 500 and "validation error" in text):
        response.headers["x-should-retry"] = "false"  # a header that the package obeys


# What the words of a failed connection mean, by a part of them
_MEANINGS = {
    "WRONG_VERSION_NUMBER": "; the server may speak http:// and no https://",
    "RECORD_LAYER_FAILURE": "; the server may speak http:// and no https://",
    "CERTIFICATE_VERIFY_FAILED": "; a certificate of your own authority is trusted if $SSL_CERT_FILE names its file",
}


def _why_unconnected(error: openai.APIError) -> str:
    """What stands behind the package's "Connection error.", in brackets; empty for other errors."""
    cause = error.__cause__
    unconnected = isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError)
    if not unconnected or cause is None or not str(cause):
        return ""
    said = " ".join(str(cause).split())[:200]
    return f" ({said}{next((meaning for words, meaning in _MEANINGS.items() if words in said), '')})"


class _Client:
    """What the two clients have in common."""

    def __init__(self, url: str, forms: Sequence[Form], known: Mapping[str, Any] | None, timeout: float) -> None:
        self.url = url
        self._key = api_key(url)
        address = parse_address(url)
        self.endpoint = Endpoint(address, forms, known)
        self.has_answered = False  # whether the server has; a caller who knows of an earlier run's replies sets it
        self._reached = False
        self._reaching = threading.Lock()
        self._settings: dict[str, Any] = {
            "base_url": address.base,
            "api_key": self._key or "none",  # the package requires one; local servers ignore it
            "timeout": openai.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            "default_query": address.query,
            # Azure takes the key in its own header; its addresses are known by their api-version
            "default_headers": {"api-key": self._key} if address.query and self._key else {},
        }

    def scrub(self, text: str) -> str:
        """`text` of the server's without the key: it goes to disk, and the server may have repeated the key in it."""
        return hide_key(text, self._key)

    def say(self, error: openai.APIError) -> str:
        """An error for people, without the key."""
        status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
        told = f"{type(error).__name__}{status}: {' '.join(error.message.split())[:300].rstrip('.')}"
        return self.scrub(told + _why_unconnected(error))

    def fatal(self, error: openai.APIError, model: str) -> UserError | None:
        """The error that ends the run, where every further request would fail like this one; else None."""
        if not isinstance(error, openai.APIStatusError):
            return None
        where, said = f"--base_url {self.url}", self.say(error)
        if error.status_code == 429 and is_out_of_quota(error.response.text):
            return UserError(f"{where}: the quota of this key is used up ({said})")
        if error.status_code == 402:
            return UserError(f"{where}: the account of this key has no credit ({said})")
        if isinstance(error, openai.AuthenticationError):
            return UserError(f"{where} refuses the key (HTTP 401): set ${API_KEY_VARIABLE} ({said})")
        if self.has_answered:
            return None  # it takes the key and has the model, so it refuses this one prompt
        if isinstance(error, openai.PermissionDeniedError):
            return UserError(f"{where} refuses the key (HTTP 403): set ${API_KEY_VARIABLE} ({said})")
        if isinstance(error, openai.NotFoundError) or error.status_code in (405, 501):
            tried = self.endpoint.tried or said
            return UserError(
                f"{where} has neither the Responses API nor chat completions, or no model {model} "
                f"(HTTP {error.status_code}): see the address and the model's name ({tried})"
            )
        return None

    def _reach(self) -> None:
        """Make sure before the first request that somebody listens.

        Raises:
            Unreachable: nobody does.
        """
        with self._reaching:
            if not self._reached:
                refuse_unreachable(self.url)
            self._reached = True

    def _mended(self, attempt: Attempt, error: openai.APIStatusError) -> bool:
        return self.endpoint.may_mend(attempt, error.status_code, error.response.text, self.say(error))

    def _accepted(self, attempt: Attempt, text: str) -> bool:
        if not self.endpoint.accept(attempt, text):
            return False
        self.has_answered = self.has_answered or self.endpoint.is_found
        return True


class AsyncClient(_Client):
    """One server, asked by coroutines.

    `ask` raises openai.APIError where the package's own retries did not help, and Unreachable at the first request
    where nobody listens.
    """

    def __init__(
        self,
        url: str,
        forms: Sequence[Form],
        known: Mapping[str, Any] | None,
        *,
        timeout: float,
        retries: int,
        on_429: Callable[[], None],
    ) -> None:
        super().__init__(url, forms, known, timeout)
        self._on_429 = on_429
        hooks: Any = {"response": [self._notice]}
        http = openai.DefaultAsyncHttpxClient(event_hooks=hooks)
        self.openai = openai.AsyncOpenAI(**self._settings, max_retries=retries, http_client=http)

    async def _notice(self, response: Any) -> None:
        # The package retries this request by itself; the callback lets the other requests slow down too
        if response.status_code == 429:
            await response.aread()
            if is_out_of_quota(response.text):
                _let_stand(response)
            else:
                self._on_429()
        elif response.status_code in _LASTING:
            await response.aread()
            _let_stand(response)

    async def ask(self, request: Request) -> str:
        """The body of the server's reply, without the key."""
        self._reach()
        while True:
            attempt = self.endpoint.attempt(request)
            try:
                response = await self.openai.post(attempt.url, cast_to=httpx2.Response, body=attempt.body)
            except openai.APIStatusError as error:
                if self._mended(attempt, error):
                    continue
                raise
            if self._accepted(attempt, response.text):
                return self.scrub(response.text)


class Client(_Client):
    """One server, asked by threads; otherwise like `AsyncClient`."""

    def __init__(self, url: str, forms: Sequence[Form], *, timeout: float, retries: int) -> None:
        super().__init__(url, forms, None, timeout)
        hooks: Any = {"response": [self._notice]}
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        self.openai = openai.OpenAI(**self._settings, max_retries=retries, http_client=http)

    def _notice(self, response: Any) -> None:
        if response.status_code in (429, *_LASTING):
            response.read()
            _let_stand(response)

    def ask(self, request: Request) -> str:
        """The body of the server's reply, without the key."""
        self._reach()
        while True:
            attempt = self.endpoint.attempt(request)
            try:
                response = self.openai.post(attempt.url, cast_to=httpx2.Response, body=attempt.body)
            except openai.APIStatusError as error:
                if self._mended(attempt, error):
                    continue
                raise
            if self._accepted(attempt, response.text):
                return self.scrub(response.text)
