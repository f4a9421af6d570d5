"""Answers of any server with OpenAI's chat completions: vLLM, `transformers serve`, a proxy, OpenAI itself.

HTTP, retries of failed requests, their backoff and Retry-After are the openai package's.
"""

import collections
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, cast

import openai

from tandem.answers.backends.base import BATCH_SIZE, Answer, Draw
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, draw_seed, prompt_seed
from tandem.servers import API_KEY_VARIABLE, CONNECT_TIMEOUT, api_key

RETRIES = 5
PASSES = 6  # over the draws that failed in spite of the retries
ERRORS_IN_A_ROW = 20  # after which the server is taken for gone
Failure = openai.APIError | UserError
REFUSED = "refused"  # finish reason of a prompt that the server does not take
TIMEOUT = 600.0  # seconds for one answer; a local server on a CPU takes minutes for a long one


class OpenAIEngine:
    """An `Engine` that asks a server; a served adapter is a model by its served name."""

    def __init__(self, options: GenerationOptions, sampling: SamplingOptions) -> None:
        assert options.base_url is not None
        self._url = options.base_url
        self._key = api_key(self._url)
        self._concurrency = options.batch_size or BATCH_SIZE
        self._sampling = sampling
        self._model = ""
        self._client = openai.OpenAI(
            base_url=self._url,
            api_key=self._key or "none",  # the package insists on one; a local server does not look at it
            max_retries=RETRIES,
            timeout=openai.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT),
        )

    def load(self, model: str) -> None:
        """See `Engine`; whether the server has the model shows at the first request."""
        self._model = model

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """See `Engine`. Prompts go to the server whole, which cuts none and applies the chat template."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = {pool.submit(self._ask, prompts[index]): index for index in sorted(wanted)}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """See `Engine`. A request a draw, since not every server knows `n`; what fails is asked again at the end.

        A prompt that the server refuses, while it answers others, is an empty answer with the finish reason `refused`.
        """
        failed: dict[Draw, Failure] = {}
        has_answered = False
        for _ in range(PASSES):
            in_a_row, failed, asked = 0, {}, sorted(failed or wanted)
            for key, answer in self._in_window(prompts, asked):
                if isinstance(answer, Answer):
                    has_answered, in_a_row = True, 0
                    yield key, answer
                elif has_answered and isinstance(answer, openai.BadRequestError | openai.UnprocessableEntityError):
                    yield key, Answer("", None, REFUSED)
                else:
                    failed[key], in_a_row = answer, in_a_row + 1
                    if in_a_row >= (ERRORS_IN_A_ROW if has_answered else 2 * self._concurrency):
                        raise self._actionable(answer, prompts[key[0]])
            if not failed:
                return
        (index, _), error = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(wanted)} draws failed: {self._actionable(error, prompts[index])}")

    def _in_window(
        self, prompts: Sequence[list[Message]], asked: Sequence[Draw]
    ) -> Iterator[tuple[Draw, Answer | Failure]]:
        """Replies or errors; what was paid for and not handed over is never more than the requests in flight."""
        waiting = collections.deque(asked)
        running: dict[Future[Answer], Draw] = {}
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self._concurrency:
                        index, number = waiting.popleft()
                        seed = draw_seed(self._sampling.seed, prompt_id(prompts[index]), number)
                        running[pool.submit(self._request, prompts[index], seed)] = index, number
                    done = wait(running, return_when=FIRST_COMPLETED).done
                    for future in done:
                        key = running.pop(future)
                        try:
                            answer: Answer | Failure = future.result()
                        except (openai.APIError, UserError) as error:
                            answer = error
                        yield key, answer
            finally:
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """See `Engine`."""
        self._client.close()

    def _ask(self, messages: list[Message]) -> Answer:
        try:
            return self._request(messages, prompt_seed(self._sampling.seed, prompt_id(messages)))
        except openai.APIError as error:
            raise self._actionable(error, messages) from None

    def _request(self, messages: list[Message], seed: int) -> Answer:
        draw = self._sampling.sampling
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=cast(Any, messages),
                max_completion_tokens=draw.max_new_tokens,
                temperature=draw.temperature,
                top_p=draw.top_p,
                seed=seed,
                stream=False,
            )
        except ValueError as error:  # of the package over a reply that was cut off
            raise UserError(f"--base_url {self._url}: its reply is not JSON: {error}") from None
        return self._read(reply)

    def _read(self, reply: Any) -> Answer:
        # The package checks no reply's form, and a server that is not OpenAI's may send any
        try:
            choice = reply.choices[0]
            text, reason = choice.message.content or "", str(choice.finish_reason)
            n_tokens = reply.usage.completion_tokens if reply.usage else None
        except (AttributeError, IndexError, TypeError):
            raise UserError(f"--base_url {self._url}: its reply is no chat completion") from None
        # A lone surrogate, which JSON can hold, has no UTF-8
        return Answer(text.encode(errors="replace").decode().strip(), n_tokens, reason)

    def _actionable(self, error: Failure, messages: list[Message]) -> UserError:
        if isinstance(error, UserError):
            return error
        where, more = f"--base_url {self._url}", "answers so far are kept, the same command goes on"
        said = " ".join(error.message.split())[:300]
        said = said.replace(self._key, "[key]") if self._key else said
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return UserError(f"{where} refuses the key (HTTP {error.status_code}): set ${API_KEY_VARIABLE}")
        if isinstance(error, openai.NotFoundError):
            return UserError(f"{where} has no chat completions or no model {self._model} (HTTP 404)")
        if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
            return UserError(f"{where} refuses prompt {prompt_id(messages)}: {said}; {more}")
        return UserError(f"{where}: {type(error).__name__}: {said}; {more}")
