"""raw.jsonl and verdicts.jsonl: the judge's replies, the verdicts in them, and what they cost."""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.judge import verdicts
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call
from tandem.judge.verdicts import Reading
from tandem.runs import append_jsonl, read_jsonl

BYTES_PER_TOKEN = 3  # few texts have fewer, so that numbers of tokens guessed with it are rarely too low


def read_log(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return read_jsonl(file)
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); move it away, or restore it") from error


class VerdictLog:
    """Reads what raw.jsonl and verdicts.jsonl hold of earlier runs, and adds to them."""

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._raw_file = options.folder / "raw.jsonl"
        self._verdict_file = options.folder / "verdicts.jsonl"
        self._ok: dict[str, dict[str, Any]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        self._attempts: collections.Counter[str] = collections.Counter()
        self._used: collections.Counter[str] = collections.Counter()
        self._cost: float | None = None if options.price_in is None else 0.0
        self._unpriced = 0  # replies whose cost is not known
        self.lenient = False  # whether replies are read leniently: True for a server that enforces no schema
        for number, record in enumerate(read_log(self._verdict_file), start=1):
            try:
                self._remember(record)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self._verdict_file} line {number}: not a verdict ({error!r}); move the file away, or restore it"
                ) from error

    def _remember(self, record: dict[str, Any]) -> None:
        key = record["key"]
        self._last[key] = record
        self._attempts[key] = max(self._attempts[key], record["attempt"])
        self._used.update(
            replies=1, input_tokens=record["input_tokens"] or 0, output_tokens=record["output_tokens"] or 0
        )
        self._add_cost(record)
        if record["status"] == "ok":
            self._ok.setdefault(key, record)

    def _add_cost(self, record: Mapping[str, Any]) -> None:
        tokens, cost = (record["input_tokens"] or 0, record["output_tokens"] or 0), record.get("cost")
        if cost is None and record.get("model") in (None, self._options.judge_model):
            cost = self._options.cost(*tokens)  # this judge's reply, from when its prices were not given
        if cost is not None:
            self._cost = (self._cost or 0.0) + cost
        elif any(tokens):
            self._unpriced += 1

    def is_ok(self, call: Call) -> bool:
        """Whether the call has its verdict and need not be asked again."""
        return call.key in self._ok

    def is_judged(self, call: Call) -> bool:
        """Whether the judge itself gave the call its verdict."""
        return self.is_ok(call) and not call.free

    def may_be_asked(self, call: Call) -> bool:
        """Whether to ask the call: not if it has a verdict, nor if its reply reached the limit of tokens, as it would
        again."""
        return self.status(call) not in ("ok", "incomplete")

    def verdict(self, call: Call) -> dict[str, Any] | None:
        """The line with the call's verdict."""
        return self._ok.get(call.key)

    def status(self, call: Call) -> str:
        """ok, or the status of the last attempt; `not_asked` if there was none."""
        record = self._ok.get(call.key) or self._last.get(call.key)
        return record["status"] if record else "not_asked"

    def detail(self, call: Call) -> str:
        """The detail of the last attempt, for a call that has no verdict."""
        return (self._last.get(call.key) or {"detail": ""})["detail"]

    def usage(self) -> dict[str, Any]:
        """Tokens and cost of all attempts, those of earlier runs too; the tokens of failed requests are not known.

        `cost` is by the prices that were given when each reply came, and None if there were never any; `unpriced`
        counts replies of other judges that are not in `cost` because their prices were not given.
        """
        return {
            "replies": self._used["replies"],
            "input_tokens": self._used["input_tokens"],
            "output_tokens": self._used["output_tokens"],
            "cost": self._cost,
            "unpriced": self._unpriced,
        }

    def add_reply(self, call: Call, body: str) -> Reading:
        """Write the reply down, then read it, so that a kill between the two loses nothing."""
        attempt = self._attempts[call.key] + 1
        append_jsonl(self._raw_file, {"key": call.key, "attempt": attempt, "body": body})
        return self._add_body(call, attempt, body)

    def _add_body(self, call: Call, attempt: int, body: str) -> Reading:
        reading = verdicts.read_reply(body, lenient=self.lenient)
        self._add(call, attempt, reading, tokens_of(call, body, reading))
        return reading

    def add_error(self, call: Call, detail: str) -> None:
        """Write down that there was no reply."""
        self._add(call, self._attempts[call.key] + 1, Reading("error", detail=detail), (0, 0))

    def add_tie(self, call: Call) -> None:
        """Write down a tie between identical answers, for which the judge need not be asked."""
        self._add(call, 0, Reading("ok", "tie", detail="identical answers"), (0, 0))

    def _add(self, call: Call, attempt: int, reading: Reading, tokens: tuple[int, int]) -> None:
        record = call.identity | {
            "attempt": attempt,
            "status": reading.status,
            "verdict": reading.verdict,
            "rationale": reading.rationale,
            "detail": reading.detail,
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "model": self._options.judge_model,
            "cost": self._options.cost(*tokens),
        }
        append_jsonl(self._verdict_file, record)
        self._remember(record)

    def recover(self, by_key: Mapping[str, Call]) -> None:
        """Read replies that a run wrote down and was killed before it read them."""
        for record in read_log(self._raw_file):
            call = by_key.get(record["key"])
            if call is not None and record["attempt"] > self._attempts[call.key] and not self.is_ok(call):
                self._add_body(call, record["attempt"], record["body"])


def tokens_of(call: Call, body: str, reading: Reading) -> tuple[int, int]:
    """Input and output tokens as the server counts them, else guessed, so that --max_cost holds without counts too."""
    if reading.input_tokens is not None and reading.output_tokens is not None:
        return reading.input_tokens, reading.output_tokens
    return guessed_tokens(call), len(body.encode()) // BYTES_PER_TOKEN


def guessed_tokens(call: Call) -> int:
    """The number of tokens of a call's prompt, guessed so that it is rarely too low."""
    return sum(len(message["content"].encode()) for message in call.messages) // BYTES_PER_TOKEN + 1


def lost(calls: Iterable[Call], log: VerdictLog) -> list[tuple[str, str, int]]:
    """Status, reason and number of the calls that were asked and have no verdict, the most frequent first."""
    ends = collections.Counter(
        (log.status(call), log.detail(call)) for call in calls if log.status(call) not in ("ok", "not_asked")
    )
    return [(status, reason, count) for (status, reason), count in ends.most_common()]
