"""Answers from any server with OpenAI's interface: vLLM, `transformers serve`, a proxy, OpenAI itself."""

import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from queue import SimpleQueue

import openai
from tqdm import tqdm

from tandem.answers.backends.base import BATCH_SIZE, FAILED, REFUSED, Answer, Draw
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.data.messages import extras_of
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, draw_seed, prompt_seed
from tandem.servers.client import Client
from tandem.servers.dialects import NoReply, Request, read_reply
from tandem.servers.reach import Unreachable

RETRIES = 5
TRIES = 3  # of a request to which the server answers HTTP 200 with an error in the body
TIMEOUT = 600.0  # seconds for one answer; a local server on a CPU takes minutes for a long one
PASSES = 6  # over all draws that are missing, the first one included
ERRORS_IN_A_ROW = 20  # after so many, the cause is taken to be the server and not the prompts
# Statuses with which a server refuses one prompt; 403 and 404 mean that only once it has answered other prompts
_OF_ONE_PROMPT = (400, 403, 404, 413, 422)
_MORE = "answers so far are kept, the same command goes on"
_WORDS = {"filtered": "content_filter"}  # finish_reason for `Reply.end`; others are written down unchanged


class Refused(Exception):
    """The server refused one prompt; the message is the server's."""


class Failed(Exception):
    """The server failed on one prompt, in spite of retries; the message is the server's."""


class Fatal(UserError):
    """Every further request would fail as well."""


Failure = Refused | Failed | UserError
_FATES = {Refused: REFUSED, Failed: FAILED}


class OpenAIBackend:
    """A `Backend` that asks a server. To it a served adapter is a model like others, by the name it is served under.

    Chat completions are tried first, since only they take a seed; then the Responses API.
    """

    def __init__(self, options: GenerationOptions, sampling: SamplingOptions) -> None:
        assert options.base_url is not None
        self._client = Client(options.base_url, ("chat", "responses"), timeout=TIMEOUT, retries=RETRIES)
        self._concurrency = options.batch_size or BATCH_SIZE
        self._sampling = sampling
        self._model = ""
        self._told: dict[str, Counter[str]] = {fate: Counter() for fate in _FATES.values()}  # the server's messages
        self._too_long = 0

    def load(self, model: str) -> None:
        """See `Backend`. Only the first request shows whether the server has the model."""
        self._model = model
        self._client.has_answered = False

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """See `Backend`. Prompts are sent uncut, as messages: the server applies the chat template.

        A prompt that the server refuses while it answers others gets an empty answer with the `finish_reason`
        "refused". A prompt on which it fails is asked again after all others; if it fails again but answers a simple
        question, the prompt gets an empty answer with the `finish_reason` "failed". Before an error ends the run,
        answers to requests under way are still yielded.
        """
        problem: UserError | None = None
        refused: list[int] = []  # since the last answer: it may yet turn out that the server refuses all prompts
        failed: set[int] = set()
        in_a_row = 0
        asked = deque((index, 0) for index in sorted(wanted))
        for (index, _), answer in self._in_window(prompts, asked, lambda key, _: prompt_seed(self._sampling.seed, key)):
            in_a_row = 0 if isinstance(answer, Answer) else in_a_row + 1
            if isinstance(answer, Answer):
                yield index, answer
                yield from _empty(refused)
            elif isinstance(answer, Refused):
                self._told[REFUSED][str(answer)] += 1
                refused.append(index)
            elif isinstance(answer, Failed) and index not in failed:
                failed.add(index)
                asked.append((index, 0))
            elif isinstance(answer, Failed) and self._answers_at_all():
                self._told[FAILED][str(answer)] += 1
                yield index, Answer("", None, FAILED)
            else:
                problem = problem or self._problem(1, answer)
            if in_a_row >= ERRORS_IN_A_ROW and not isinstance(answer, Answer):
                problem = problem or self._problem(in_a_row, answer)
            if problem is not None:
                asked.clear()
        if problem is None and refused and not self._client.has_answered:
            problem = self._refuses_all(len(refused), self._told[REFUSED].most_common(1)[0][0])
        if problem is not None:
            raise problem
        yield from _empty(refused)
        self._tell()

    def _answers_at_all(self) -> bool:
        """Whether the server answers a simple, harmless question."""
        request = Request(self._model, [{"role": "user", "content": "Say yes."}], max_tokens=16)
        try:
            return read_reply(self._client.ask(request)).end != "failed"
        except (openai.APIError, NoReply, UserError):
            return False

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """See `Backend`. Each draw is a request, since not every server knows `n`; failed ones are repeated at the end.

        Where the server refuses a prompt, or fails on it in every pass, while it answers others, the draw is an empty
        answer with the finish reason `refused` or `failed`.
        """
        failed: dict[Draw, Failure] = {}
        problem: UserError | None = None
        has_answered = False

        def seed_of(key: str, number: int) -> int:
            return draw_seed(self._sampling.seed, key, number)

        for _ in range(PASSES):
            in_a_row, asked, failed = 0, deque(sorted(failed or wanted)), {}
            for draw, answer in self._in_window(prompts, asked, seed_of):
                if isinstance(answer, Answer):
                    has_answered, in_a_row = True, 0
                    yield draw, answer
                elif has_answered and isinstance(answer, Refused):
                    yield draw, Answer("", None, REFUSED)
                else:
                    failed[draw], in_a_row = answer, in_a_row + 1
                    ends = in_a_row >= (ERRORS_IN_A_ROW if has_answered else 2 * self._concurrency)
                    if ends or isinstance(answer, Fatal):
                        problem = problem or self._problem(1, answer)
                        asked.clear()
            if problem is not None:
                raise problem
            if not failed:
                return
        if any(isinstance(failure, UserError) for failure in failed.values()) or not self._answers_at_all():
            problem = self._problem(1, next(iter(failed.values())))
            raise UserError(f"{len(failed)} of {len(wanted)} draws failed: {problem}")
        for draw, failure in failed.items():
            yield draw, Answer("", None, _FATES[type(failure)])

    def _problem(self, count: int, failure: Failure) -> UserError:
        """The error that ends the run after `count` failures in a row, the last of which is `failure`."""
        if isinstance(failure, Refused):
            return self._refuses_all(count, str(failure))
        if isinstance(failure, Failed):
            return UserError(f"--base_url {self._client.url}: {failure}; {_MORE}")
        return failure

    def _in_window(
        self, prompts: Sequence[list[Message]], asked: deque[Draw], seed_of: Callable[[str, int], int]
    ) -> Iterator[tuple[Draw, Answer | Failure]]:
        """Replies or errors, as they come. A kill loses at most the replies to the requests under way.

        Args:
            asked: the draws still to be asked for; if the caller empties it, replies under way are still yielded
            seed_of: gives the seed for a prompt's id and the number of the draw
        """
        left, ready = SimpleQueue[Draw | None](), SimpleQueue[tuple[Draw, Answer | Exception]]()
        running, workers = 0, min(self._concurrency, len(asked))
        for _ in range(workers):
            # Daemons, since Ctrl-C must not wait for a server that hangs
            threading.Thread(target=self._work, args=(prompts, seed_of, left, ready), daemon=True).start()
        try:
            while asked or running:
                while asked and running < workers:
                    left.put(asked.popleft())
                    running += 1
                draw, answer = ready.get()
                running -= 1
                if not isinstance(answer, Answer | Refused | Failed | UserError):
                    raise answer
                yield draw, answer
        finally:
            for _ in range(workers):
                left.put(None)

    def _work(
        self,
        prompts: Sequence[list[Message]],
        seed_of: Callable[[str, int], int],
        left: SimpleQueue[Draw | None],
        ready: SimpleQueue[tuple[Draw, Answer | Exception]],
    ) -> None:
        """Ask for draws until there is None, one at a time."""
        while (draw := left.get()) is not None:
            index, number = draw
            try:
                ready.put((draw, self._request(prompts[index], seed_of(prompt_id(prompts[index]), number))))
            except Exception as error:
                ready.put((draw, error))

    def _refuses_all(self, count: int, said: str) -> UserError:
        prompts = "prompt" if count == 1 else f"{count} prompts, one after another"
        return UserError(f"--base_url {self._client.url} refuses {prompts}: {said}; {_MORE}")

    def _tell(self) -> None:
        where = f"--base_url {self._client.url}"
        for fate, said in self._told.items():
            if count := said.total():
                did = "refused" if fate == REFUSED else "failed on"
                what = f"{where} {did} {count} prompts, whose answers are empty: {said.most_common(1)[0][0]}"
                tqdm.write(what, file=sys.stderr)
            said.clear()
        if self._too_long:
            limit = self._sampling.sampling.max_new_tokens
            tqdm.write(
                f"{where}: {self._too_long} answers are longer than --max_new_tokens {limit}, which it does not keep",
                file=sys.stderr,
            )
        self._too_long = 0

    def close(self) -> None:
        """See `Backend`."""
        self._client.openai.close()

    def _request(self, messages: list[Message], seed: int) -> Answer:
        draw = self._sampling.sampling
        request = Request(
            self._model,
            messages,
            max_tokens=draw.max_new_tokens,
            temperature=draw.temperature,
            top_p=draw.top_p,
            seed=seed,
            extras=extras_of(messages),
        )
        problem = ""
        for _ in range(TRIES):
            try:
                answer, problem = self._read(self._client.ask(request))
            except openai.APIError as error:
                raise self._actionable(error) from None
            except Unreachable as error:
                raise Fatal(str(error)) from None
            except UserError as error:  # the server lacks the form that such a request needs
                raise Fatal(f"--base_url {self._client.url}: {error}") from None
            if answer is not None:
                return answer
        raise Failed(problem)

    def _read(self, body: str) -> tuple[Answer | None, str]:
        """The answer, or None and the reason why there is none."""
        try:
            reply = read_reply(body)
        except NoReply as problem:
            return None, str(problem)
        if reply.end == "failed":
            return None, f"the server reports: {reply.detail[:300]}"
        if (reply.output_tokens or 0) > self._sampling.sampling.max_new_tokens:
            self._too_long += 1
        # A lone surrogate, which JSON can hold, cannot be encoded as UTF-8
        text = reply.text.encode(errors="replace").decode().strip()
        return Answer(text, reply.output_tokens, _WORDS.get(reply.end, reply.end)), ""

    def _actionable(self, error: openai.APIError) -> Exception:
        said = self._client.say(error)
        if fatal := self._client.fatal(error, self._model):
            return Fatal(str(fatal))
        if isinstance(error, openai.APIStatusError):
            return Refused(said) if error.status_code in _OF_ONE_PROMPT else Failed(said)
        if isinstance(error, openai.APITimeoutError):
            return Failed(said)
        return UserError(f"--base_url {self._client.url}: {said}; {_MORE}")


def _empty(refused: list[int]) -> Iterator[tuple[int, Answer]]:
    while refused:
        yield refused.pop(), Answer("", None, REFUSED)
