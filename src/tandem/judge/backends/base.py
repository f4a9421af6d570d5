"""What a judge's backend is."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Protocol, Self

from tandem.judge.requests import Call


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of asking once: the body of a reply, which nobody has read yet, or the error in its place."""

    body: str | None = None
    error: str = ""

    @classmethod
    def of_text(cls, text: str) -> Self:
        """A reply that says `text`, as a chat completion: for backends that are no server."""
        message = {"role": "assistant", "content": text}
        return cls(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))


class Backend(Protocol):
    """Asks the judge. The caller sees to the pace, the budget and what is written down.

    Raises from both:
        UserError: no further request can succeed.
        OverBudget: what is to be asked at once might cost more than is left; nothing was asked.
    """

    retries: bool  # whether it has retried what it hands over as an error

    async def expect(self, calls: Sequence[Call]) -> None:
        """These calls, and no others, will be asked next, and what was asked before is written down."""

    async def ask(self, call: Call) -> Reply:
        """Have one of the expected calls answered."""
