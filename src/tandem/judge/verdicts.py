"""Reads a reply of the judge: a verdict, or the reason why there is none. Pure: text in, `Reading` out."""

import ast
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tandem.data.non_answers import spoken
from tandem.servers import dialects

Status = Literal["ok", "refusal", "malformed", "incomplete", "error"]
Order = Literal["12", "21"]
ORDERS: tuple[Order, Order] = ("12", "21")  # which answer is shown first, as A


class Verdict(BaseModel):
    # No docstring: pydantic would put it into the schema that the judge is sent. The rationale comes first, so that the
    # judge writes its reasons before its verdict.
    model_config = ConfigDict(extra="forbid", strict=True)

    rationale: str
    verdict: Literal["A", "B", "tie"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reply says. `verdict` is set if and only if `status` is ok; tokens are None if the server counts none."""

    status: Status
    verdict: str | None = None
    rationale: str = ""
    detail: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None


def read_reply(body: str, *, lenient: bool = False) -> Reading:
    """Read the body of one reply, of the Responses API or of chat completions.

    A refusal is what the server marks as one. A reply is malformed if it is in neither form, or if its text does not
    hold exactly one verdict as a JSON object of the schema `Verdict`. Prose or a code fence around the object, which
    servers that ignore schemas add, is accepted, and so is reasoning that ends with `</think>`. `lenient` is for
    servers that enforce no schema: see `find_verdict`.
    """
    try:
        reply = dialects.read_reply(body)
    except dialects.NoReply as problem:
        return Reading("malformed", detail=short(problem))

    def reading(status: Status, detail: str) -> Reading:
        return Reading(status, detail=detail, input_tokens=reply.input_tokens, output_tokens=reply.output_tokens)

    if reply.end == "failed":
        return reading("error", f"the server reports: {short(reply.detail)}")
    if reply.end == "refused":
        return reading("refusal", short(reply.detail))
    if reply.end == "filtered":
        return reading("refusal", "stopped by the server's content filter")
    if reply.end == "length":
        return reading("incomplete", short(reply.detail) + (", all of it reasoning" if reply.only_reasoning else ""))
    found = find_verdict(reply.text, lenient=lenient)
    if isinstance(found, str):
        return reading("malformed", "nothing but reasoning in the reply" if reply.only_reasoning else found)
    return dataclasses.replace(reading("ok", ""), verdict=found.verdict, rationale=_printable(found.rationale))


def find_verdict(text: str, *, lenient: bool = False) -> Verdict | str:
    """The one verdict that `text` holds, or why it holds none.

    Reasoning is not read, since it may hold drafts. Two different verdicts count as none: one may be a quotation from a
    judged answer. `lenient` accepts what small models write where no schema is enforced: verdicts and keys in upper or
    lower case, raw newlines in the rationale, further keys, an object around the verdict's, and Python's quotes and
    trailing commas.
    """
    found: list[Verdict] = []
    problem = "no JSON object in the reply"
    for candidate in _json_objects(text if _is_object(text) else spoken(text), lenient):
        try:
            found.append(_lenient_verdict(candidate) if lenient else Verdict.model_validate(candidate))
        except ValidationError as error:
            problem = _first_problem(error)
    if not found:
        return problem
    if len({verdict.verdict for verdict in found}) > 1:
        return "more than one verdict in the reply"
    return found[-1]


def _is_object(text: str) -> bool:
    """Whether the whole reply is one object; then a reasoning tag in it is part of the rationale."""
    return isinstance(_object(text), dict)


_WORDS = {"a": "A", "b": "B", "tie": "tie"}
_TYPOGRAPHIC = str.maketrans("“”„‘’", '"""\'\'')
_FLAT_OBJECT = re.compile(r"\{[^{}]{1,20000}\}")


def _lenient_verdict(candidate: Any) -> Verdict:
    candidate = _lower_keys(candidate)
    if isinstance(candidate, dict) and "verdict" not in candidate:
        inner = [_lower_keys(_object(value)) for value in candidate.values()]
        wrapped = [value for value in inner if isinstance(value, dict) and "verdict" in value]
        candidate = wrapped[0] if len(wrapped) == 1 else candidate
    if isinstance(candidate, dict):
        candidate = {name: candidate[name] for name in Verdict.model_fields if name in candidate}
        word = candidate.get("verdict")
        if isinstance(word, str):
            candidate["verdict"] = _WORDS.get(word.strip().lower(), word)
    return Verdict.model_validate(candidate)


def _lower_keys(value: Any) -> Any:
    return {str(name).strip().lower(): one for name, one in value.items()} if isinstance(value, dict) else value


def _object(value: Any) -> Any:
    """`value`, or what it stands for where it is a text of JSON."""
    try:
        return json.loads(value, strict=False) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _json_objects(text: str, lenient: bool) -> list[Any]:
    decoder = json.JSONDecoder(strict=not lenient)
    if lenient and text.strip().startswith('"'):
        text = next((value for value in [_object(text.strip())] if isinstance(value, str)), text)
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
    return objects or (_python_objects(text) if lenient else [])


def _python_objects(text: str) -> list[Any]:
    """Objects with quotes or trailing commas that Python takes and JSON does not."""
    objects = []
    for found in _FLAT_OBJECT.findall(text):
        for written in (found, found.translate(_TYPOGRAPHIC)):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                objects.append(ast.literal_eval(written))
                break
    return objects


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return short(f"{where}: {first['msg']}" if where else first["msg"])


def short(value: Any, limit: int = 300) -> str:
    """`value` as one line of at most `limit` characters, without what cannot be written to a file."""
    text = _printable(" ".join(str(value).split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _printable(text: str) -> str:
    """`text` with question marks for lone surrogates, which JSON may hold but a UTF-8 file cannot."""
    return text.encode(errors="replace").decode()


def vote(verdict: str, order: str) -> int:
    """The index of a verdict's outcome for answer 2 in (loss, tie, win): 0, 1 or 2."""
    if verdict == "tie":
        return 1
    first_wins = verdict == "A"
    return 2 if first_wins == (order == "21") else 0


def outcome(records: Iterable[Mapping[str, Any]]) -> str:
    """The outcome for answer 2 on one prompt: won, lost or tie if both orders agree, else disagree or unjudged.

    A record has `status`, `verdict` and `order`. Of several verdicts in one order the majority counts.
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
