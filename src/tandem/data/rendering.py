"""Messages → text by a tokenizer's chat template, with a template's refusal as one sentence."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from tandem.data.messages import REASONING, Message
from tandem.data.rows import Row
from tandem.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSALS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError)


class TemplateFault(UserError):
    """A fault of a chat template over one row, which must not be used. Whoever knows the file and row adds them.

    Attributes:
        said: without what to do about it.
    """

    def __init__(self, said: str, remedy: str) -> None:
        super().__init__(f"{said}; {remedy}")
        self.said = said


def keywords_of(row: Row) -> dict[str, Any]:
    """What a row has for its chat template beside messages, as TRL 1.16 hands it on: `tools` and keywords."""
    return {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}


def templated(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    keywords: Mapping[str, Any] | None = None,
    *,
    asks: bool = False,
) -> str:
    """A conversation as text; with `asks`, with what the template puts before an answer at its end.

    Raises:
        TemplateFault: the template refuses it.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            _as_named_by(tokenizer, messages), tokenize=False, add_generation_prompt=asks, **(keywords or {})
        )
    except _REFUSALS as error:
        raise TemplateFault(f"the chat template refuses it: {_first_line(error)}", _remedy(messages)) from error
    return str(text)


def _remedy(messages: Sequence[Message]) -> str:
    if messages and messages[0]["role"] == "system":
        return "--system_prompt fold puts the system message into the first user turn, drop leaves it out"
    return "give a template that takes it with --chat_template"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _as_named_by(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[Message]:
    """Reasoning under the name that the template reads: `reasoning_content` or `thinking`."""
    named = [name for message in messages for name in REASONING if name in message]
    if not named:
        return list(messages)
    template = str(tokenizer.chat_template)
    known = [name for name in REASONING if name in template]
    if not known or all(name in known for name in named):
        return list(messages)
    return [
        {known[0] if name in REASONING and name not in known else name: part for name, part in message.items()}
        for message in messages
    ]
