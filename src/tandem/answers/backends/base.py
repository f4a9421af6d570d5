"""What a backend is, and what those that hold the model here have in common."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Asked, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 8  # prompts at a time, where the user and the backend leave it open: requests, and rows on Gaudi


Draw = tuple[int, int]  # index of the prompt, and which of its draws, counted from 0
REFUSED = "refused"  # finish_reason of a prompt that a server would not answer
FAILED = "failed"  # and of one that it fails on, again and again, while it answers others


@dataclass(frozen=True)
class Answer:
    """One answer. `n_tokens` counts the end-of-sequence token too; None where a server does not say."""

    text: str
    n_tokens: int | None
    finish_reason: str  # stop: the model ended it; length: the limit did; a server may have further words


class Backend(Protocol):
    """Draws answers, one model at a time."""

    def load(self, model: str) -> None:
        """Make `model` the one that answers: a model's or adapter's folder or Hub name, or the name served.

        Raises:
            UserError: there is no such model, or the backend cannot take it.
        """

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """Answers to the prompts with the indices `wanted`, each with its index, as they get ready.

        The draw for a prompt depends on the seed, the prompt and at most the rest of `prompts`, never on `wanted`.

        Raises:
            UserError: a server failed, or refused every prompt.
        """

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """Those of the `count` draws of each prompt that are `wanted`, as they get ready.

        Each has a seed of its own (`models.sampling.draw_seed`), so that it depends, but for rounding, on neither the
        other draws nor the other prompts.

        Raises:
            UserError: a server failed.
        """

    def close(self) -> None:
        """Free what the backend holds."""


def weights_dtype(options: GenerationOptions) -> str:
    """The type that models are loaded in: the user's, or bfloat16 where an accelerator multiplies it, or float32."""
    from tandem.devices import fast_bf16, has_accelerator

    return options.dtype or ("bfloat16" if has_accelerator() and fast_bf16() else "float32")


def encode(prompts: Sequence[list[Message]], tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[list[int]]:
    """Token ids of prompts as the model sees them, cut to `max_tokens` from the left.

    Raises:
        UserError: the chat template refuses a prompt or leaves out a part of it; with file and row where known.
    """
    from tandem.data.texts import asked_ids
    from tandem.data.tokenized import all_made

    places = [prompt.place if isinstance(prompt, Asked) else "" for prompt in prompts]
    return all_made(prompts, places, lambda prompt: asked_ids(prompt, tokenizer, max_tokens), "prompts")


def read_answer(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", ends: Collection[int]) -> Answer:
    """Token ids of an answer, its end-of-sequence token among them if it came, as an Answer."""
    stopped = bool(ids) and ids[-1] in ends
    # The token that ends a turn need not be one that the tokenizer calls special, and skips
    text: Any = tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
    return Answer(text.strip(), len(ids), "stop" if stopped else "length")
