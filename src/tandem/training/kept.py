"""Which tokenized rows a training keeps, and what it says of those that train nothing or teach no end."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from tandem.data.tokens import ends, special_ids
from tandem.errors import UserError
from tandem.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


def kept(items: Sequence[Item], trains: Callable[[Item], bool], *, what: str, why: str, max_length: int) -> list[Item]:
    """Those of `items` that train something; how many do not is said, with `why`. `what` names one.

    Raises:
        UserError: none is left.
    """
    found = [item for item in items if trains(item)]
    if not found:
        raise UserError(
            f"--max_length {max_length}: no {what} keeps any of its answers; raise it or set --max_prompt_length"
        )
    if len(found) < len(items):
        logger.warning("%d of %d %ss left out: %s", len(items) - len(found), len(items), what, why)
    return found


def warn_of_endless(
    answers: Iterable[Sequence[Sequence[int]]], tokenizer: "PreTrainedTokenizerBase", what: str
) -> None:
    """Warn if no special token ends an answer. `answers` are those of each row, as ids; `what` names a row."""
    specials = special_ids(tokenizer)
    endings = [all(ends(ids, specials) for ids in of_row) for of_row in answers]
    if not all(endings):
        logger.warning(
            "%d of %d %ss have an answer that no special token ends: the model would not learn to stop; give a chat "
            "template that writes the end-of-sequence token with --chat_template",
            endings.count(False),
            len(endings),
            what,
        )
