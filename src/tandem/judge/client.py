"""Asking the judge: one request at a time or as a batch, every reply handed over before it is read.

HTTP, retries of failed requests, their backoff and Retry-After (up to two minutes) are the openai package's.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import openai

from tandem.errors import UserError
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Judge
from tandem.judge.verdicts import NO_REPLY, Reading, Verdict, read_reply, short
from tandem.runs import append_jsonl, read_jsonl
from tandem.servers import API_KEY_VARIABLE, CONNECT_TIMEOUT, api_key

PROBES = 4
ERRORS_IN_A_ROW = 20  # requests that failed for good, one after another, after which the server is taken for gone
HALVING_PAUSE = 1.0  # seconds in which further 429s are taken for the same congestion
BATCH_POLL = 30.0  # seconds between two looks at a batch
BATCH_REQUESTS = 50_000  # OpenAI's limit for one batch
BATCH_BYTES = 150_000_000  # under OpenAI's limit of 200 MB for its file


def is_out_of_quota(body: str) -> bool:
    """Whether a server that answers 429 does so since the account has nothing left, and not for the pace."""
    return "insufficient_quota" in body


OnReply = Callable[[Call, str], None]
OnError = Callable[[Call, str], None]


class OverBudget(Exception):
    """The next request might cost more than --max_cost leaves."""


class Admission:
    """Who may ask now: at most `limit` requests at a time, and none that might overrun the budget.

    The limit is halved at a 429 and grows by one after as many replies as it allows at a time (additive increase,
    multiplicative decrease). A request that waits out a Retry-After keeps its place, which slows the rest down too.
    """

    def __init__(self, maximum: int, left: float | None) -> None:
        self.maximum = self.limit = maximum
        self.left = left  # of the budget; None: no budget
        self._active = 0
        self._reserved = 0.0
        self._replies = 0
        self._halved_at = -HALVING_PAUSE
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def request(self, worst_cost: float) -> AsyncIterator[None]:
        """Wait for a place, and keep `worst_cost` of the budget back while the block runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._active < self.limit and self._affordable(worst_cost))
            self.check(worst_cost)
            self._active += 1
            self._reserved += worst_cost
        try:
            yield
        finally:
            async with self._changed:
                self._active -= 1
                self._reserved -= worst_cost
                self._replies += 1
                if self._replies >= self.limit:
                    self._replies = 0
                    self.limit = min(self.maximum, self.limit + 1)
                self._changed.notify_all()

    def _within_budget(self, worst_cost: float) -> bool:
        return self.left is None or self._reserved + worst_cost <= self.left

    def _affordable(self, worst_cost: float) -> bool:
        # With requests under way, some of what they hold back may come free: wait rather than give up
        return self._within_budget(worst_cost) or self._active == 0

    def check(self, worst_cost: float) -> None:
        """Raise OverBudget if `worst_cost` might not be left."""
        if not self._within_budget(worst_cost):
            raise OverBudget

    def spend(self, cost: float) -> None:
        """Take what a reply cost off the budget."""
        if self.left is not None:
            self.left -= cost

    def too_many_requests(self) -> None:
        """The server answered 429."""
        now = asyncio.get_running_loop().time()
        if now - self._halved_at >= HALVING_PAUSE:
            self._halved_at = now
            self._replies = 0
            self.limit = max(1, self.limit // 2)


class Client:
    """The judge's server.

    Raises from every request:
        UserError: the key, the model or the address is refused, so that no further request can succeed.
    """

    def __init__(self, options: JudgeOptions, admission: Admission) -> None:
        self.options = options
        self.admission = admission
        self.has_answered = False  # in this run or, as the caller knows, in an earlier one
        self._key = api_key(options.base_url)
        self._openai = openai.AsyncOpenAI(
            base_url=options.base_url,
            api_key=self._key or "none",  # the package insists on one; a local server does not look at it
            max_retries=options.max_attempts - 1,
            timeout=openai.Timeout(options.timeout, connect=min(options.timeout, CONNECT_TIMEOUT)),
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._notice]}),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._openai.close()

    async def _notice(self, response: Any) -> None:
        # The package retries a 429 by itself; this is how the others learn of it
        if response.status_code == 429:
            await response.aread()
            if is_out_of_quota(response.text):
                response.headers["x-should-retry"] = "false"  # the package's word for it; no wait mends this
            else:
                self.admission.too_many_requests()

    async def _post(self, judge: Judge, messages: Sequence[dict[str, str]]) -> str:
        reply = await self._openai.responses.with_raw_response.parse(
            model=judge.model,
            input=cast(Any, messages),
            text_format=Verdict if judge.schema_enforced else openai.omit,
            parse_as=None,  # the reply is written down before it is read
            store=False,
            stream=False,
            **judge.sampling,
        )
        self.has_answered = True
        return self._scrub(reply.http_response.text)

    def _scrub(self, text: str) -> str:
        """What a server sends goes to disk; the key must not, though the server may repeat it."""
        return text.replace(self._key, "[key]") if self._key else text

    def _fatal(self, error: openai.APIStatusError) -> UserError | None:
        """Errors that every further request would meet as well. The server's own words may repeat the key."""
        where = f"--base_url {self.options.base_url}"
        said = self._say(error)
        if error.status_code == 429 and is_out_of_quota(error.response.text):
            return UserError(f"{where}: the quota of this key is used up ({said})")
        if isinstance(error, openai.AuthenticationError):
            return UserError(f"{where} refuses the key (HTTP 401): set ${API_KEY_VARIABLE} ({said})")
        if self.has_answered:
            return None  # it takes the key and has the model: the refusal is of one prompt
        if isinstance(error, openai.PermissionDeniedError):
            return UserError(f"{where} refuses the key (HTTP 403): set ${API_KEY_VARIABLE} ({said})")
        if isinstance(error, openai.NotFoundError):
            return UserError(
                f"{where} has no Responses API or no model {self.options.judge_model} (HTTP 404): "
                f"see --base_url and --judge_model ({said})"
            )
        return None

    def _say(self, error: openai.APIError) -> str:
        status = f" {error.status_code}" if isinstance(error, openai.APIStatusError) else ""
        return self._scrub(f"{type(error).__name__}{status}: {' '.join(error.message.split())[:300]}")

    async def enforces_schema(self, judge: Judge) -> tuple[bool | None, list[str]]:
        """Whether the server holds replies to a schema, and the replies that show it; None where all were cut off.

        A request that asks for something else than a verdict: what comes back has the schema's form only if the server
        forces it. Repeated, since one bad reply must not decide the form of all that follow.

        Raises:
            UserError: the server cannot be reached, refuses both forms, or sends nothing that the API would.
        """
        messages = [{"role": "user", "content": "Name a colour."}]
        replies: list[str] = []
        readings: list[Reading] = []
        try:
            for _ in range(PROBES):
                replies.append(await self._post(judge, messages))
                readings.append(read_reply(replies[-1]))
                if readings[-1].status == "ok":
                    return True, replies
            if all(reading.status == "error" or reading.detail.startswith(NO_REPLY) for reading in readings):
                raise UserError(
                    f"--base_url {self.options.base_url} answers with HTTP 200 and no reply: {readings[-1].detail} "
                    f"({short(replies[-1], 100)})"
                )
            whole = [reading for reading in readings if reading.status != "incomplete"]
            return (False if whole else None), replies
        except openai.APIStatusError as error:
            if fatal := self._fatal(error):
                raise fatal from None
            if not isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
                raise UserError(f"--base_url {self.options.base_url}: {self._say(error)}") from None
            refused = self._say(error)
        except openai.APIError as error:
            raise self._unreachable(error) from None
        # It may be the schema that it does not take
        try:
            return False, [refused, await self._post(dataclasses.replace(judge, schema_enforced=False), messages)]
        except openai.APIError as error:
            raise UserError(f"--base_url {self.options.base_url} refuses the request: {self._say(error)}") from None

    def _unreachable(self, error: openai.APIError) -> UserError:
        return UserError(f"--base_url {self.options.base_url} does not answer: {self._say(error)}")

    def _gone(self, error: openai.APIError) -> UserError:
        return UserError(
            f"--base_url {self.options.base_url}: {ERRORS_IN_A_ROW} requests in a row failed, the last with "
            f"{self._say(error)}; verdicts so far are kept, run the same command again to go on"
        )

    async def ask_all(
        self,
        judge: Judge,
        calls: Sequence[Call],
        worst_cost: Callable[[Call], float],
        on_reply: OnReply,
        on_error: OnError,
    ) -> None:
        """Ask every call once (failed requests are retried) and hand over what came back.

        Raises:
            OverBudget: the rest would cost more than is left; what was under way has been handed over.
            UserError: no further request can succeed.
        """
        waiting = iter(calls)
        failed_in_a_row = 0

        async def ask(call: Call) -> None:
            nonlocal failed_in_a_row
            async with self.admission.request(worst_cost(call)):
                try:
                    reply = await self._post(judge, call.messages)
                except openai.APIError as error:
                    if isinstance(error, openai.APIStatusError) and (fatal := self._fatal(error)):
                        raise fatal from None
                    on_error(call, self._say(error))
                    failed_in_a_row += 1
                    if failed_in_a_row >= ERRORS_IN_A_ROW:
                        raise self._gone(error) from None
                else:
                    failed_in_a_row = 0
                    on_reply(call, reply)

        async def worker() -> None:
            nonlocal waiting
            while (call := next(waiting, None)) is not None:
                try:
                    await ask(call)
                except BaseException:
                    waiting = iter(())  # the others finish what they have asked, and stop
                    raise

        outcomes = await asyncio.gather(
            *(worker() for _ in range(min(self.options.max_concurrency, len(calls)))), return_exceptions=True
        )
        _raise_first(outcomes)

    async def ask_batch(
        self,
        judge: Judge,
        calls: Sequence[Call],
        worst_cost: Callable[[Call], float],
        folder: Path,
        on_reply: OnReply,
        on_error: OnError,
    ) -> None:
        """Ask every call once through the Batch API.

        `batches.jsonl` in `folder` holds each batch's id from before the first look at it, so that a run that was
        killed goes on waiting for the same batch. One killed between the creation and that line finds the batch by
        the digest of its requests.

        Raises:
            OverBudget: the whole batch might cost more than is left; nothing was asked.
            UserError: the server refused.
        """
        self.admission.check(sum(map(worst_cost, calls)))
        by_key = {call.key: call for call in calls}
        with self._batch_errors():
            for lines in _batch_files(judge.body(call) | {"key": call.key} for call in by_key.values()):
                await self._create_batch(lines, folder)
        await self.collect_batches(by_key, folder, on_reply, on_error)

    @contextlib.contextmanager
    def _batch_errors(self) -> Iterator[None]:
        where = f"--batch: {self.options.base_url}"
        try:
            yield
        except openai.NotFoundError:
            raise UserError(f"{where} has no Batch API (HTTP 404): judge without --batch") from None
        except openai.APIError as error:
            if isinstance(error, openai.APIStatusError) and (fatal := self._fatal(error)):
                raise fatal from None
            raise UserError(f"{where} failed: {self._say(error)}; run the same command again to go on") from None

    async def _create_batch(self, lines: list[bytes], folder: Path) -> None:
        # Rounds that repeat the same requests must differ, hence the number of batches so far
        number = len(read_jsonl(folder / "batches.jsonl"))
        digest = hashlib.sha256(b"".join(lines)).hexdigest()[:32] + f"-{number}"
        known = await self._openai.batches.list(limit=100)
        batch = next((one for one in known.data if (one.metadata or {}).get("tandem") == digest), None)
        if batch is None:
            file = await self._openai.files.create(file=("judge.jsonl", b"".join(lines)), purpose="batch")
            batch = await self._openai.batches.create(
                input_file_id=file.id, endpoint="/v1/responses", completion_window="24h", metadata={"tandem": digest}
            )
        append_jsonl(folder / "batches.jsonl", {"event": "created", "batch_id": batch.id, "requests": len(lines)})

    async def collect_batches(
        self, by_key: dict[str, Call], folder: Path, on_reply: OnReply, on_error: OnError
    ) -> None:
        """Wait for every batch on disk that was not collected yet, and hand over its replies.

        Raises:
            UserError: the server refused a batch as a whole.
        """
        for batch_id in open_batches(folder):
            with self._batch_errors():
                batch = await self._openai.batches.retrieve(batch_id)
                while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
                    await asyncio.sleep(BATCH_POLL)
                    batch = await self._openai.batches.retrieve(batch_id)
                files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
                results = [(await self._openai.files.content(file_id)).text for file_id in files]
            for text in results:
                self._hand_over(text, by_key, on_reply, on_error)
            append_jsonl(folder / "batches.jsonl", {"event": "collected", "batch_id": batch_id, "status": batch.status})
            if batch.status == "failed":
                problems = batch.errors.data if batch.errors and batch.errors.data else []
                reason = self._scrub(str(problems[0].message)) if problems else "no reason given"
                raise UserError(f"--batch: {self.options.base_url} refused batch {batch_id}: {reason}")

    def _hand_over(self, text: str, by_key: dict[str, Call], on_reply: OnReply, on_error: OnError) -> None:
        for line in text.splitlines():
            try:
                result = json.loads(line)
                call, response = by_key.get(result["custom_id"]), result.get("response") or {}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a torn line: its call has no verdict and is asked again
            if call is None:
                continue  # of an earlier set of comparisons
            if response.get("status_code") == 200:
                on_reply(call, self._scrub(json.dumps(response.get("body"))))
            else:
                problem = json.dumps(result.get("error") or response.get("body"))
                on_error(call, self._scrub(f"batch: {response.get('status_code')} {problem[:300]}"))


def _raise_first(outcomes: Iterable[BaseException | None]) -> None:
    """Raise what ended the workers; a cause that the user can act on goes first."""
    errors = [outcome for outcome in outcomes if outcome is not None]
    for error in sorted(errors, key=lambda one: not isinstance(one, UserError)):
        raise error


def _batch_files(requests: Iterable[dict[str, Any]]) -> Iterable[list[bytes]]:
    """Lines of the Batch API's input files, each file within the API's limits."""
    lines: list[bytes] = []
    size = 0
    for body in requests:
        key = body.pop("key")
        line = json.dumps({"custom_id": key, "method": "POST", "url": "/v1/responses", "body": body}).encode() + b"\n"
        if lines and (len(lines) == BATCH_REQUESTS or size + len(line) > BATCH_BYTES):
            yield lines
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield lines


def open_batches(folder: Path) -> list[str]:
    """Ids of batches that were created and not collected."""
    events = read_jsonl(folder / "batches.jsonl")
    collected = {event["batch_id"] for event in events if event["event"] == "collected"}
    return [event["batch_id"] for event in events if event["event"] == "created" and event["batch_id"] not in collected]
