"""Answers of any server with OpenAI's chat completions: vLLM, `transformers serve`, a proxy, OpenAI itself.

HTTP, retries of failed requests, their backoff and Retry-After are the openai package's.
"""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

import openai

from tandem.answers.backends.base import BATCH_SIZE, Answer
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, prompt_seed
from tandem.servers import API_KEY_VARIABLE, CONNECT_TIMEOUT, api_key

RETRIES = 5
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

    def close(self) -> None:
        """See `Engine`."""
        self._client.close()

    def _ask(self, messages: list[Message]) -> Answer:
        draw = self._sampling.sampling
        try:
            reply = self._client.chat.completions.create(
                model=self._model,
                messages=cast(Any, messages),
                max_completion_tokens=draw.max_new_tokens,
                temperature=draw.temperature,
                top_p=draw.top_p,
                seed=prompt_seed(self._sampling.seed, prompt_id(messages)),
                stream=False,
            )
        except openai.APIError as error:
            raise self._actionable(error, messages) from None
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

    def _actionable(self, error: openai.APIError, messages: list[Message]) -> UserError:
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
