"""OpenAI's Batch API: cheaper, up to a day."""

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

BATCH_POLL = 30.0  # seconds between two looks at a batch
BATCH_REQUESTS = 50_000  # OpenAI's limit for one batch
BATCH_BYTES = 150_000_000  # under OpenAI's limit of 200 MB for its file
LOG = "batches.jsonl"
_ROUTES = {"responses": "/v1/responses", "chat": "/v1/chat/completions"}


class BatchBackend:
    """A `Backend` that has all expected calls answered at once, and then hands the answers out.

    `batches.jsonl` in `folder` holds each batch's id from before the first look at it, so that a run that was killed
    goes on waiting for the same batch. One killed between the creation and that line finds the batch by the digest of
    its requests. A batch counts as collected once its replies are written down.
    """

    retries = False

    def __init__(
        self, client: AsyncClient, judge: Judge, folder: Path, afford: Callable[[Sequence[Call]], None]
    ) -> None:
        """`afford` raises OverBudget where calls might cost more than is left."""
        self._client = client
        self._judge = judge
        self._folder = folder
        self._afford = afford
        self._replies: dict[str, Reply] = {}
        self._fetched: list[tuple[str, str]] = []  # batches whose replies are here, id and status

    async def expect(self, calls: Sequence[Call]) -> None:
        """See `Backend`. First waits for the batches of an earlier run, then creates those of the calls left."""
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
        """What the batches brought is on disk: they need not be fetched again."""
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
        # Rounds that repeat the same requests must differ, hence the number of batches so far
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
        """Wait for every batch on disk that was not collected yet, and fetch its replies."""
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
                self._mark(batch_id, "failed")  # nothing is to be had of it
                problems = batch.errors.data if batch.errors and batch.errors.data else []
                reason = self._client.scrub(str(problems[0].message)) if problems else "no reason given"
                raise UserError(f"--batch: {self._client.url} refused batch {batch_id}: {reason}")

    def _read(self, text: str) -> None:
        for line in text.splitlines():
            try:
                result = json.loads(line)
                key, response = str(result["custom_id"]), result.get("response") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a torn line: its call has no verdict and is asked again
            if response.get("status_code") == 200:
                self._replies[key] = Reply(self._client.scrub(json.dumps(response.get("body"))))
            else:
                problem = json.dumps(result.get("error") or response.get("body"))
                said = self._client.scrub(f"batch: {response.get('status_code')} {problem[:300]}")
                self._replies.setdefault(key, Reply(error=said))


def batch_files(requests: Iterable[tuple[str, Mapping[str, Any]]], route: str) -> Iterator[list[bytes]]:
    """Lines of the Batch API's input files, of keys and bodies; each file within the API's limits."""
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
