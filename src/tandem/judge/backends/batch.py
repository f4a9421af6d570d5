"""OpenAI's Batch API, which is cheaper and takes up to a day."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import openai

from tandem.errors import UserError
from tandem.judge.backends.base import Reply
from tandem.judge.requests import Call, Judge
from tandem.runs import append_jsonl, read_jsonl
from tandem.servers.client import AsyncClient
from tandem.servers.dialects import body_of

BATCH_POLL = 30.0  # seconds between two queries of a batch's status
BATCH_REQUESTS = 50_000  # OpenAI's limit for one batch
BATCH_BYTES = 150_000_000  # under OpenAI's limit of 200 MB for its file
LOG = "batches.jsonl"
_ROUTES = {"responses": "/v1/responses", "chat": "/v1/chat/completions"}


class BatchBackend:
    """A `Backend` that sends all expected calls as batches, waits for them, and then hands the replies out.

    `batches.jsonl` in `folder` holds each batch's id as soon as the batch is created, so that a killed run, started
    again, waits for the same batch. If it was killed before that line was written, it finds the batch by the digest of
    its requests. A batch counts as collected once its replies are written down.
    """

    retries = False

    def __init__(
        self, client: AsyncClient, judge: Judge, folder: Path, afford: Callable[[Sequence[Call]], None]
    ) -> None:
        """`afford` raises OverBudget if calls might cost more than is left."""
        self._client = client
        self._judge = judge
        self._folder = folder
        self._afford = afford
        self._replies: dict[str, Reply] = {}
        self._fetched: list[tuple[str, str]] = []  # id and status of batches that were fetched and not yet written down

    async def expect(self, calls: Sequence[Call]) -> None:
        """See `Backend`. Waits for batches of an earlier run first, then creates batches of the remaining calls."""
        self.settle()
        self._replies = {}
        with self._errors():
            await self._collect()
            by_key = {call.key: call for call in calls if call.key not in self._replies}
            if not by_key:
                return
            self._afford(list(by_key.values()))
            form, left_out = self._client.endpoint.form, self._client.endpoint.left_out
            requests = {key: self._judge.request(call.messages) for key, call in by_key.items()}
            bodies = ((key, body_of(request, form, left_out)) for key, request in requests.items())
            for lines in batch_files(bodies, _ROUTES[form]):
                await self._create(lines, _ROUTES[form])
            await self._collect()

    async def ask(self, call: Call) -> Reply:
        """See `Backend`."""
        return self._replies.get(call.key) or Reply(error="batch: the server sent no reply to this call")

    def settle(self) -> None:
        """Mark the fetched batches as collected: their replies are on disk by now."""
        for batch_id, status in self._fetched:
            self._mark(batch_id, status)
        self._fetched = []

    def _mark(self, batch_id: str, status: str) -> None:
        append_jsonl(self._folder / LOG, {"event": "collected", "batch_id": batch_id, "status": status})

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        where = f"--batch: {self._client.url}"
        try:
            yield
        except openai.NotFoundError:
            raise UserError(f"{where} has no Batch API (HTTP 404): judge without --batch") from None
        except openai.APIError as error:
            if fatal := self._client.fatal(error, self._judge.model):
                raise fatal from None
            raise UserError(f"{where} failed: {self._client.say(error)}; run the same command again to go on") from None

    async def _create(self, lines: list[bytes], route: Any) -> None:
        # A later round may repeat the same requests in a new batch: the number of batches so far tells them apart
        number = len(read_jsonl(self._folder / LOG))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()[:32] + f"-{number}"
        batches, files = self._client.openai.batches, self._client.openai.files
        known = await batches.list(limit=100)
        batch = next((one for one in known.data if (one.metadata or {}).get("tandem") == digest), None)
        if batch is None:
            file = await files.create(file=("judge.jsonl", b"".join(lines)), purpose="batch")
            batch = await batches.create(
                input_file_id=file.id, endpoint=route, completion_window="24h", metadata={"tandem": digest}
            )
        append_jsonl(self._folder / LOG, {"event": "created", "batch_id": batch.id, "requests": len(lines)})

    async def _collect(self) -> None:
        """Wait for each batch in batches.jsonl that was not collected yet, and fetch its replies."""
        batches, files = self._client.openai.batches, self._client.openai.files
        fetched = {batch_id for batch_id, _ in self._fetched}
        for batch_id in open_batches(self._folder):
            if batch_id in fetched:
                continue
            batch = await batches.retrieve(batch_id)
            while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
                await asyncio.sleep(BATCH_POLL)
                batch = await batches.retrieve(batch_id)
            for file_id in (batch.output_file_id, batch.error_file_id):
                if file_id:
                    self._read((await files.content(file_id)).text)
            if batch.status != "failed":
                self._fetched.append((batch_id, batch.status))
            else:
                self._mark(batch_id, "failed")  # it has no replies
                problems = batch.errors.data if batch.errors and batch.errors.data else []
                reason = self._client.scrub(str(problems[0].message)) if problems else "no reason given"
                raise UserError(f"--batch: {self._client.url} refused batch {batch_id}: {reason}")

    def _read(self, text: str) -> None:
        for line in text.splitlines():
            try:
                result = json.loads(line)
                key, response = str(result["custom_id"]), result.get("response") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged line: its call stays without a verdict and is asked again
            if response.get("status_code") == 200:
                self._replies[key] = Reply(self._client.scrub(json.dumps(response.get("body"))))
            else:
                problem = json.dumps(result.get("error") or response.get("body"))
                said = self._client.scrub(f"batch: {response.get('status_code')} {problem[:300]}")
                self._replies.setdefault(key, Reply(error=said))


def batch_files(requests: Iterable[tuple[str, Mapping[str, Any]]], route: str) -> Iterator[list[bytes]]:
    """The lines of input files for the Batch API, made of keys and bodies; each file is within the API's limits."""
    lines: list[bytes] = []
    size = 0
    for key, body in requests:
        line = json.dumps({"custom_id": key, "method": "POST", "url": route, "body": body}).encode() + b"\n"
        if lines and (len(lines) == BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield lines


def open_batches(folder: Path) -> list[str]:
    """Ids of batches that were created and not collected."""
    events = read_jsonl(folder / LOG)
    collected = {event["batch_id"] for event in events if event["event"] == "collected"}
    return [event["batch_id"] for event in events if event["event"] == "created" and event["batch_id"] not in collected]
