"""In which form and at which address a server takes requests: the first ones find out. No network here."""

import dataclasses
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from tandem.servers.address import ROUTES, Address
from tandem.servers.dialects import Form, Hollow, NoReply, Request, body_of, read_reply
from tandem.servers.refusals import JSON_SCHEMA, SYSTEM, refused_parameter

NO_SUCH_ROUTE = (404, 405, 501)
NOT_UNDERSTOOD = (400, 422, 500, 501)  # some proxies answer 500 where the server behind them answered 400
_INSTEAD = {
    "max_completion_tokens": "max_tokens is sent instead",
    JSON_SCHEMA: "json_object is sent instead, with the schema",
    SYSTEM: "what it says is put before the user's first words",
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One HTTP request: where, and what."""

    url: str
    body: dict[str, Any]
    way: int  # index of its pair of base and form


class Endpoint:
    """The ways to ask a server, pairs of address and form, of which its replies show the right one.

    Until a first reply, a route that is not there leads to the next way; after it, the way stays. A parameter that the
    server does not know is left out from then on, which is printed. Safe to use from several threads.
    """

    def __init__(self, address: Address, forms: Sequence[Form], known: Mapping[str, Any] | None = None) -> None:
        """`forms` are tried in their order; `known` is the `state` of an earlier run with the same address."""
        named = [form for form in forms if address.form in (None, form)]
        self._ways = [(base, form) for form in named for base in address.bases]
        self._way = 0
        self._found = False
        self._refusals: list[str] = []  # the server's errors for the ways that were given up
        self._lock = threading.Lock()
        self.left_out: list[str] = []
        if known is not None and (way := (known.get("base"), known.get("form"))) in self._ways:
            self._way, self._found = self._ways.index(way), True  # type: ignore[arg-type]
            self.left_out = [str(name) for name in known.get("left_out", [])]

    @property
    def state(self) -> dict[str, Any]:
        """What was found out, for `known` of a later run."""
        base, form = self._ways[self._way]
        return {"base": base, "form": form, "left_out": sorted(self.left_out)}

    @property
    def is_found(self) -> bool:
        """Whether the way that requests take now has brought a reply."""
        return self._found

    @property
    def form(self) -> Form:
        """The form that requests take now."""
        return self._ways[self._way][1]

    @property
    def tried(self) -> str:
        """The ways that led nowhere, each with the server's error."""
        return "; ".join(self._refusals)

    def attempt(self, request: Request) -> Attempt:
        """The next HTTP request for `request`."""
        with self._lock:
            base, form = self._ways[self._way]
            return Attempt(f"{base}{ROUTES[form]}", body_of(request, form, self.left_out), self._way)

    def may_mend(self, attempt: Attempt, status: int, said: str, short: str) -> bool:
        """Whether to try once more after an HTTP error: another way, or without the parameter that was refused.

        Args:
            said: the body of the error
            short: the error as a message for people, without secrets
        """
        with self._lock:
            if status in NO_SUCH_ROUTE and attempt.way < self._way:
                return True  # meanwhile another request has moved on to the next way
            if not self._found and status in NO_SUCH_ROUTE:
                return self._next_way(attempt, f"{attempt.url}: {short}")
            return status in NOT_UNDERSTOOD and self._leaves_out(attempt, said, short)

    def _leaves_out(self, attempt: Attempt, said: str, short: str) -> bool:
        name = refused_parameter(attempt.body, said)
        if name is None:
            return False
        if name not in self.left_out:
            self.left_out.append(name)
            what = {SYSTEM: "a system message", JSON_SCHEMA: "a response_format of json_schema"}.get(name, name)
            told = f"{attempt.url} does not take {what}: {_INSTEAD.get(name, 'it is left out')} ({short})"
            tqdm.write(told, file=sys.stderr)
        return True

    def accept(self, attempt: Attempt, body: str) -> bool:
        """Whether the body of a 200 is a reply to take; else the request is to be sent again, another way.

        Where they have no interface, some servers send 200 with a page in HTML or with an error about the address;
        others send 200 with the refusal of a parameter.
        """
        with self._lock:
            if self._found and '"error"' not in body:
                return True
            try:
                reply = read_reply(body)
            except Hollow:
                return True  # the form shows that the way is right
            except NoReply as problem:
                return self._found or not self._next_way(attempt, f"{attempt.url}: {problem}")
            if reply.end == "failed" and self._leaves_out(attempt, body, reply.detail[:300]):
                return False
            if self._found:
                return True
            words = reply.detail.lower()
            if reply.end == "failed" and ("endpoint" in words or "route" in words):
                return not self._next_way(attempt, f"{attempt.url}: {reply.detail}")
            if reply.end != "failed":
                self._found, self._way = True, attempt.way
            return True

    def _next_way(self, attempt: Attempt, why: str) -> bool:
        if attempt.way == self._way:
            self._refusals.append(why[:300])
            if self._way + 1 == len(self._ways):
                return False
            self._way += 1
        return self._way > attempt.way
