"""A judge behind a server with the Responses API or chat completions, asked by one request a call."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from tandem.errors import UserError
from tandem.judge.backends.base import Reply
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Judge
from tandem.judge.verdicts import Reading, read_reply, short
from tandem.servers.client import AsyncClient
from tandem.servers.dialects import NO_REPLY

PROBES = 4
ERRORS_IN_A_ROW = 20  # failed requests, one after another, after which the server is taken for gone


class ServerBackend:
    """A `Backend` that asks one server."""

    retries = True

    def __init__(self, client: AsyncClient, judge: Judge) -> None:
        self._client = client
        self._judge = judge
        self._failed_in_a_row = 0

    async def expect(self, calls: Sequence[Call]) -> None:
        """See `Backend`; there is nothing to prepare."""

    async def ask(self, call: Call) -> Reply:
        """See `Backend`."""
        try:
            body = await self._client.ask(self._judge.request(call.messages))
        except openai.APIError as error:
            if fatal := self._client.fatal(error, self._judge.model):
                raise fatal from None
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= ERRORS_IN_A_ROW:
                raise UserError(
                    f"--base_url {self._client.url}: {ERRORS_IN_A_ROW} requests in a row failed, the last with "
                    f"{self._client.say(error)}{_mend(error)}; verdicts so far are kept, run the same command again to "
                    "go on"
                ) from None
            return Reply(error=self._client.say(error))
        self._failed_in_a_row = 0
        return Reply(body)


def _mend(error: openai.APIError) -> str:
    return "; raise --timeout if the server is slow" if isinstance(error, openai.APITimeoutError) else ""


def client_of(options: JudgeOptions, known: Mapping[str, Any] | None, on_429: Any) -> AsyncClient:
    """The client of the judge's server, which tries the Responses API first, then chat completions."""
    return AsyncClient(
        options.url,
        ("responses", "chat"),
        known,
        timeout=options.timeout,
        retries=options.max_attempts - 1,
        on_429=on_429,
    )


async def enforces_schema(client: AsyncClient, judge: Judge) -> tuple[bool | None, list[str]]:
    """Whether the server makes replies follow a schema, and the replies that show it; None if all were cut off.

    The request asks for something other than a verdict: a reply has the form of a verdict only if the server enforces
    the schema. It is repeated, so that a single bad reply does not decide how all calls are asked.

    Raises:
        UserError: the server cannot be reached, refuses both forms, or sends nothing that is a reply.
    """
    where = f"--base_url {client.url}"
    request = judge.request([{"role": "user", "content": "Name a colour."}])
    replies: list[str] = []
    readings: list[Reading] = []
    try:
        for _ in range(PROBES):
            replies.append(await client.ask(request))
            readings.append(read_reply(replies[-1]))
            if readings[-1].status == "ok":
                return True, replies
        if all(reading.status == "error" or reading.detail.startswith(NO_REPLY) for reading in readings):
            raise UserError(
                f"{where} answers with HTTP 200 and no reply: {readings[-1].detail} ({short(replies[-1], 100)})"
            )
        whole = [reading for reading in readings if reading.status != "incomplete"]
        return (False if whole else None), replies
    except openai.APIStatusError as error:
        if fatal := client.fatal(error, judge.model):
            raise fatal from None
        refused = client.say(error)
    except openai.APIError as error:
        raise UserError(f"{where} does not answer: {client.say(error)}{_mend(error)}") from None
    # Perhaps it is the schema that the server refuses
    try:
        return False, [refused, await client.ask(dataclasses.replace(request, schema=None))]
    except openai.APIError as error:
        raise UserError(f"{where} refuses the request: {client.say(error)}") from None
