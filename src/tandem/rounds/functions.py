"""Scores by a function of the user's, for answers that code can check."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tandem.data.formats import Message
from tandem.errors import UserError, one_line
from tandem.objects import load_object, version_of

FIRST = 10  # answers after which a function that raised an exception on every one is given up

ScoreFunction = Callable[[Sequence[Message], str, Mapping[str, Any]], Any]


class Function:
    """`function(prompt, answer, row) -> float`: prompt as messages, answer as text, row as the data has it.

    A result of None means no score; so does an exception, whose message is reported.

    Raises:
        UserError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self._function: ScoreFunction = load_object(name, "--score_function")
        if not callable(self._function):
            raise UserError(f"--score_function {name}: is a {type(self._function).__name__}, not a function")
        self.name = name
        self._asked = self._scored = 0

    @property
    def version(self) -> str:
        """A digest of the file that the function is in: its scores are valid as long as the file stays the same."""
        return version_of(self.name)

    def score(self, messages: Sequence[Message], answer: str, row: Mapping[str, Any]) -> tuple[float | None, str]:
        """A finite score, or None and the reason.

        Raises:
            UserError: the function raised an exception on each of the first answers, or returned something that is
                neither a number nor None.
        """
        self._asked += 1
        try:
            value = self._function([dict(message) for message in messages], answer, dict(row))  # type: ignore[arg-type]
        except Exception as error:  # the user's code, on answers that may be anything
            reason = one_line(f"{type(error).__name__}: {error}")[:200]
            if not self._scored and self._asked >= FIRST:
                raise UserError(
                    f"--score_function {self.name}: failed on all of {self._asked} answers: {reason}"
                ) from error
            return None, f"error: {reason}"
        if value is None:
            self._scored += 1
            return None, "no_score"
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"--score_function {self.name}: must give a number or None, not {type(value).__name__}"
            ) from None
        self._scored += 1
        return (number, "") if math.isfinite(number) else (None, "not_finite")
