"""The protocol of a judge's backend."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Protocol, Self

from tandem.judge.requests import Call


@dataclasses.dataclass(frozen=True)
class Reply:
    """The outcome of one request: the body of a reply, not parsed yet, or an error."""

    body: str | None = None
    error: str = ""

    @classmethod
    def of_text(cls, text: str) -> Self:
        """A reply that says `text`, in the form of a chat completion: for backends that ask no server."""
        message = {"role": "assistant", "content": text}
        return cls(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))


class Backend(Protocol):
    """Asks the judge. The caller limits rate and cost, and writes down the replies.

    Both methods raise:
        UserError: no further request can succeed.
        OverBudget: what is to be asked at once might cost more than is left; nothing was asked.
    """

    retries: bool  # whether it has retried a request by the time it returns an error

    async def expect(self, calls: Sequence[Call]) -> None:
        """Prepare for `calls`, which alone will be asked next. The replies to earlier calls are written down by now."""

    async def ask(self, call: Call) -> Reply:
        """The reply to one of the expected calls."""
