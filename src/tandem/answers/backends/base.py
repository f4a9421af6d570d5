"""The protocol of backends, and what those that hold the model on this machine have in common."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Asked, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 8  # prompts at a time, unless the user says otherwise: requests to a server, and rows on Gaudi


Draw = tuple[int, int]  # index of the prompt, and number of the draw, from 0
REFUSED = "refused"  # finish_reason for a prompt that a server refuses to answer
FAILED = "failed"  # finish_reason for a prompt on which a server fails repeatedly, while it answers others


@dataclass(frozen=True)
class Answer:
    """One answer. `n_tokens` includes the end-of-sequence token; it is None where a server does not count tokens."""

    text: str
    n_tokens: int | None
    finish_reason: str  # stop: the model ended it; length: it reached the limit; servers may have other words


class Backend(Protocol):
    """Draws answers, one model at a time."""

    def load(self, model: str) -> None:
        """Make `model` the one that answers: the folder or Hub name of a model or adapter, or a server's name for it.

        Raises:
            UserError: there is no such model, or the backend cannot take it.
        """

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """Answers to the prompts with the indices `wanted`, each with its index, as they become ready.

        An answer depends on the seed, the prompt and at most on the other `prompts`, never on `wanted`: a run that was
        killed and goes on draws the same.

        Raises:
            UserError: a server failed, or refused every prompt.
        """

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """The `wanted` ones of `count` draws of each prompt, as they become ready.

        Each has a seed of its own (`models.sampling.draw_seed`), so that it does not depend, except for rounding, on
        the other draws or prompts.

        Raises:
            UserError: a server failed.
        """

    def close(self) -> None:
        """Free what the backend holds."""


def weights_dtype(options: GenerationOptions) -> str:
    """The type that models are loaded in: the user's, else bfloat16 where an accelerator multiplies it fast, else
    float32."""
    from tandem.devices import fast_bf16, has_accelerator

    return options.dtype or ("bfloat16" if has_accelerator() and fast_bf16() else "float32")


def encode(prompts: Sequence[list[Message]], tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> list[list[int]]:
    """Token ids of prompts as the model sees them, cut to `max_tokens` from the left.

    Raises:
        UserError: the chat template refuses a prompt or leaves out a part of it; names file and row where known.
    """
    from tandem.data.texts import asked_ids
    from tandem.data.tokenized import all_made

    places = [prompt.place if isinstance(prompt, Asked) else "" for prompt in prompts]
    return all_made(prompts, places, lambda prompt: asked_ids(prompt, tokenizer, max_tokens), "prompts")


def read_answer(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", ends: Collection[int]) -> Answer:
    """The Answer that token ids are, with the end-of-sequence token as their last one if the model wrote it."""
    stopped = bool(ids) and ids[-1] in ends
    # The end token is cut off here: the tokenizer skips it only if it counts as special, which it need not
    text: Any = tokenizer.decode(list(ids[:-1] if stopped else ids), skip_special_tokens=True)
    return Answer(text.strip(), len(ids), "stop" if stopped else "length")
