"""The two forms of OpenAI's interface, Responses and chat completions: requests to bodies, bodies to replies. Pure."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from tandem.errors import UserError
from tandem.servers import streams
from tandem.servers.refusals import JSON_SCHEMA, SYSTEM, folded
from tandem.servers.tools import call_texts, chat_messages

Form = Literal["responses", "chat"]
End = Literal["stop", "length", "filtered", "refused", "failed"]
NO_REPLY = "not a reply of the Responses API or of chat completions"


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to a model, in neither form yet. What is None is left to the server."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None  # the Responses API has none
    schema: Mapping[str, Any] | None = None  # `name`, `strict` and the JSON `schema` of the answer
    extras: Mapping[str, Any] | None = None  # `tools`, and the `chat_template_kwargs` that vLLM takes beside messages


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model answered. Tokens are None where the server does not count them."""

    text: str
    end: str  # why it stopped: an End, or a word of the server's that is none of them
    detail: str = ""  # the words of a refusal, the message of an error, or why it was cut off
    input_tokens: int | None = None
    output_tokens: int | None = None
    only_reasoning: bool = False  # there is reasoning and no text


class NoReply(ValueError):
    """A body that is a reply in neither form."""


class Hollow(NoReply):
    """A body in one of the forms whose contents are missing or of the wrong kind."""


def body_of(request: Request, form: Form, left_out: Collection[str] = ()) -> dict[str, Any]:
    """The body of `request` in one form, without the parameters that the server refuses.

    With `max_completion_tokens` among `left_out`, the same limit is sent under its older name, `max_tokens`; with
    `SYSTEM`, the system message goes into the first user message; with `JSON_SCHEMA`, the schema is sent with the type
    `json_object`.

    Raises:
        UserError: a request with extras or tool calls, in the form `responses`.
    """
    sampling = {"temperature": request.temperature, "top_p": request.top_p}
    messages = folded(request.messages) if SYSTEM in left_out else request.messages
    body: dict[str, Any] = {"model": request.model}
    if form == "responses":
        if request.extras or any(message.get("tool_calls") for message in request.messages):
            raise UserError("tools and chat_template_kwargs are asked with by chat completions, which the server lacks")
        body |= {"input": messages, "store": False, "stream": False}
        body |= sampling | {"max_output_tokens": request.max_tokens}
        if request.schema is not None:
            body["text"] = {"format": {"type": "json_schema", **request.schema}}
    else:
        limit = "max_tokens" if "max_completion_tokens" in left_out else "max_completion_tokens"
        body |= {"messages": chat_messages(messages), "stream": False, **(request.extras or {})}
        body |= sampling | {limit: request.max_tokens, "seed": request.seed}
        if request.schema is not None:
            asked = {"type": JSON_SCHEMA, JSON_SCHEMA: dict(request.schema)}
            as_object = {"type": "json_object", "schema": request.schema["schema"]}
            body["response_format"] = as_object if JSON_SCHEMA in left_out else asked
    return {name: value for name, value in body.items() if value is not None and name not in left_out}


def read_reply(body: str) -> Reply:
    """Read the body of a reply in either form.

    Raises:
        NoReply: it is a reply in neither form.
    """
    try:
        reply = streams.joined(body) if streams.is_stream(body) else json.loads(body)
    except (ValueError, RecursionError) as error:
        raise NoReply(f"{NO_REPLY}: {error}") from None
    if not isinstance(reply, dict):
        raise NoReply(f"{NO_REPLY}: {type(reply).__name__} and no object")
    if "output" in reply and reply["output"] is not None:
        return _read_response(reply)
    if "choices" in reply:
        return _read_completion(reply)
    if reply.get("error"):
        return Reply("", "failed", detail=said_by(reply["error"]))
    raise NoReply(f"{NO_REPLY}: neither output nor choices in it")


def said_by(error: Any) -> str:
    """An error's message, where it has one."""
    return str(error.get("message") or error if isinstance(error, dict) else error)


def _read_response(reply: Mapping[str, Any]) -> Reply:
    items = reply["output"]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise Hollow(f"{NO_REPLY}: output is no list of objects")
    # Reasoning models mark their interim commentary, which is no answer, by another `phase`
    messages = [item for item in items if item.get("type") == "message"]
    contents = [item.get("content") for item in messages if item.get("phase") in (None, "final_answer")]
    text = "".join(piece for content in contents for piece in _pieces(content, "content"))
    refusals = [str(part.get("refusal") or "") for part in _objects(contents) if part.get("type") == "refusal"]
    tokens = _tokens(reply.get("usage"))
    only_reasoning = not text.strip() and any(item.get("type") == "reasoning" for item in items)
    status, error = reply.get("status"), reply.get("error")
    if error or status in _NOT_DONE:
        return Reply(text, "failed", said_by(error) if error else str(status), *tokens)
    if refusals:
        return Reply(text, "refused", " ".join(refusals), *tokens)
    if status == "incomplete":
        details = reply.get("incomplete_details")
        reason = str((details if isinstance(details, dict) else {}).get("reason") or "no reason given")
        return Reply(text, "filtered" if reason == "content_filter" else "length", reason, *tokens, only_reasoning)
    return Reply(text, "stop", "", *tokens, only_reasoning)


_NOT_DONE = ("failed", "cancelled", "queued", "in_progress")  # a status
# Why a completion ended, in the words of OpenAI, Anthropic, Gemini, Mistral, Zhipu, DeepSeek, Bedrock, TGI and vLLM
_WORDS_OF_ENDS: dict[str, str] = {
    "stop": "stop none eos eos_token end_turn stop_sequence done complete completed finish_reason_unspecified",
    "length": "length max_tokens max_output_tokens max_length model_length token_limit model_context_window_exceeded",
    "filtered": "content_filter content_filtered safety recitation prohibited_content blocklist spii sensitive "
    "guardrail_intervened",
    "refused": "refusal",
    "failed": "error abort aborted cancelled canceled network_error insufficient_system_resource timeout",
}
_ENDS = {word: end for end, words in _WORDS_OF_ENDS.items() for word in words.split()} | {"": "stop"}


def _read_completion(reply: Mapping[str, Any]) -> Reply:
    choices = reply["choices"]
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if message is None and isinstance(choice, dict) and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}  # the form of plain, older completions
    if not isinstance(choice, dict) or not isinstance(message, dict):
        problem = reply.get("error")
        if problem:
            return Reply("", "failed", said_by(problem), *_tokens(reply.get("usage")))
        raise Hollow(f"{NO_REPLY}: no message among its choices")
    content = message.get("content")
    pieces = [*_pieces([content] if isinstance(content, dict) else content, "content")]
    text = "\n".join(["".join(pieces), *call_texts(message)]).removeprefix("\n")
    tokens = _tokens(reply.get("usage"))
    reasoning = message.get("reasoning_content") or message.get("reasoning") or not isinstance(content, str | None)
    if error := choice.get("error") or reply.get("error"):
        return Reply(text, "failed", said_by(error), *tokens)
    if message.get("refusal"):
        return Reply(text, "refused", str(message["refusal"]), *tokens)
    word = str(choice.get("finish_reason"))
    end = _ENDS.get(word.lower(), word)
    return Reply(text, end, word, *tokens, not text.strip() and bool(reasoning))


def _pieces(content: Any, where: str) -> Iterable[str]:
    """Texts of a message's content: the content itself, or those of its chunks that are text.

    Raises:
        Hollow: it is neither text nor a list of chunks.
    """
    if content is None:
        return
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise Hollow(f"{NO_REPLY}: {where} is neither text nor a list")
    for chunk in content:
        if isinstance(chunk, str):
            yield chunk
        elif not isinstance(chunk, dict):
            raise Hollow(f"{NO_REPLY}: {where} has a chunk that is no object")
        elif chunk.get("type") in (None, "", "text", "output_text"):
            text = chunk.get("text")
            if text is not None and not isinstance(text, str):
                raise Hollow(f"{NO_REPLY}: {where}.text is no text")
            yield text or ""


def _objects(contents: Iterable[Any]) -> Iterable[Mapping[str, Any]]:
    return (part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict))


def _tokens(usage: Any) -> tuple[int | None, int | None]:
    """Input and output tokens, under the names of either form."""
    return _count(usage, "input_tokens", "prompt_tokens"), _count(usage, "output_tokens", "completion_tokens")


def _count(usage: Any, *names: str) -> int | None:
    for name in names:
        value = usage.get(name) if isinstance(usage, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return int(value)
    return None
