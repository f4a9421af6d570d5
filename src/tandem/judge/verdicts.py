"""What one reply of a judge means: a verdict, or the reason why there is none. Pure: text in, `Reading` out."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

Status = Literal["ok", "refusal", "malformed", "incomplete", "error"]
Order = Literal["12", "21"]
ORDERS: tuple[Order, Order] = ("12", "21")  # which answer is shown first, as A


class Verdict(BaseModel):
    # No docstring: it would go into the schema that the judge is sent. The rationale comes first so that the verdict
    # is written after the reasons for it.
    model_config = ConfigDict(extra="forbid", strict=True)

    rationale: str
    verdict: Literal["A", "B", "tie"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """One reply, read. `verdict` is set exactly if `status` is ok; tokens are None where the server names none."""

    status: Status
    verdict: str | None = None
    rationale: str = ""
    detail: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Content(BaseModel):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class _Message(BaseModel):
    content: list[_Content] = []
    phase: str | None = None


class _Usage(BaseModel):
    input_tokens: int
    output_tokens: int


class _Reply(BaseModel):
    # What is read of the Responses API's reply; whatever else a server sends is of no interest
    output: list[dict[str, Any]]
    status: str | None = None
    usage: _Usage | None = None
    incomplete_details: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


def read_reply(body: str) -> Reading:
    """Read the body of one reply of the Responses API.

    A refusal is what the server marks as one. A reply is malformed if it is not the API's JSON, or if its text is not
    exactly one JSON object of the schema `Verdict`; prose or a code fence around the object is let pass, since
    servers that ignore schemas add them.
    """
    try:
        reply = _Reply.model_validate_json(body)
        messages = [_Message.model_validate(item) for item in reply.output if item.get("type") == "message"]
    except ValidationError as error:
        return Reading("malformed", detail=f"not a reply of the Responses API: {_first_problem(error)}")
    tokens = (reply.usage.input_tokens, reply.usage.output_tokens) if reply.usage else (None, None)

    def reading(status: Status, detail: str) -> Reading:
        return Reading(status, detail=detail, input_tokens=tokens[0], output_tokens=tokens[1])

    if reply.status == "failed" or reply.error:
        return reading("error", f"the server reports: {_short((reply.error or {}).get('message', 'failed'))}")
    # `phase` marks interim commentary of reasoning models, which is no answer
    contents = [part for message in messages if message.phase in (None, "final_answer") for part in message.content]
    refusals = [part.refusal or "" for part in contents if part.type == "refusal"]
    if refusals:
        return reading("refusal", _short(" ".join(refusals)))
    if reply.status == "incomplete":
        reason = (reply.incomplete_details or {}).get("reason", "no reason given")
        if reason == "content_filter":
            return reading("refusal", "stopped by the server's content filter")
        return reading("incomplete", _short(reason))
    text = "".join(part.text or "" for part in contents if part.type == "output_text")
    found = find_verdict(text)
    if isinstance(found, str):
        return reading("malformed", found)
    return dataclasses.replace(reading("ok", ""), verdict=found.verdict, rationale=_printable(found.rationale))


def find_verdict(text: str) -> Verdict | str:
    """The one verdict that `text` holds, or why it holds none.

    Two different verdicts in one text are none: the first may be quoted from a judged answer.
    """
    found: list[Verdict] = []
    problem = "no JSON object in the reply"
    for candidate in _json_objects(text):
        try:
            found.append(Verdict.model_validate(candidate))
        except ValidationError as error:
            problem = _first_problem(error)
    if not found:
        return problem
    if len({verdict.verdict for verdict in found}) > 1:
        return "more than one verdict in the reply"
    return found[-1]


def _json_objects(text: str) -> list[Any]:
    decoder = json.JSONDecoder()
    objects = []
    start = text.find("{")
    while start != -1:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            objects.append(value)
        start = text.find("{", end)
    return objects


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return _short(f"{where}: {first['msg']}" if where else first["msg"])


def _short(value: Any, limit: int = 300) -> str:
    text = _printable(" ".join(str(value).split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _printable(text: str) -> str:
    """`text` with question marks for lone surrogates, which JSON may hold and no file can."""
    return text.encode(errors="replace").decode()


def vote(verdict: str, order: str) -> int:
    """Index of a verdict among (loss, tie, win) of answer 2: 0, 1 or 2."""
    if verdict == "tie":
        return 1
    first_wins = verdict == "A"
    return 2 if first_wins == (order == "21") else 0


def outcome(records: Iterable[Mapping[str, Any]]) -> str:
    """won, lost or tie for answer 2 by the verdicts on one prompt, if both orders say so; else disagree or unjudged.

    A record has `status`, `verdict` and `order`; verdicts of one order are added up.
    """
    leads: dict[str, int] = {}
    for record in records:
        if record["status"] == "ok":
            lead = vote(record["verdict"], record["order"]) - 1
            leads[record["order"]] = leads.get(record["order"], 0) + lead
    if len(leads) < 2:
        return "unjudged"
    signs = {(lead > 0) - (lead < 0) for lead in leads.values()}
    return {1: "won", 0: "tie", -1: "lost"}[signs.pop()] if len(signs) == 1 else "disagree"
