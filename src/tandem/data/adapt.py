"""Changes a tokenizer's chat template so that it renders as a run's options say.

What the options ask for is written at the beginning of the template itself, which is saved with the tokenizer. So
Tandem's stages, and any other program, prompt the model as it was trained.
"""

import json
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.data.unrendered import DROPPED
from tandem.errors import UserError
from tandem.options.model import TemplateOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEGIN, _END = "{#- tandem -#}", "{{ '' }}{#- end of tandem -#}"
_PRELUDE = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_DAY = "tandem: the day is "
_TOLD = re.compile(_DAY + r"(\d{4}-\d\d-\d\d)")
_SYSTEM = "{%- if messages and messages[0]['role'] == 'system' %}"
_FOLD = (
    _SYSTEM + "{%- if messages[1:] and messages[1]['role'] == 'user' %}"
    "{%- set messages = [dict(messages[1], content=messages[0]['content'] + '\\n\\n' + messages[1]['content'])]"
    " + messages[2:] %}{%- else %}"
    "{%- set messages = [{'role': 'user', 'content': messages[0]['content']}] + messages[1:] %}"
    "{%- endif %}{%- endif %}"
)
_DROP = "{#- " + DROPPED + " -#}" + _SYSTEM + "{%- set messages = messages[1:] %}{%- endif %}"
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "conversation"}


def adapt_template(tokenizer: "PreTrainedTokenizerBase", options: TemplateOptions, day: str | None) -> None:
    """Give `tokenizer` the template that the options ask for; with `day`, YYYY-MM-DD, it writes that date for today's.

    Raises:
        UserError: a file that cannot be read, or a keyword that is none of a template's.
    """
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template {options.chat_template}: cannot be read: {error}") from error
    prelude = _prelude(options)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _adapted(text, prelude, day) for name, text in template.items()}
    else:
        tokenizer.chat_template = _adapted(template, prelude, day)


def _prelude(options: TemplateOptions) -> str:
    parts = []
    for name, value in options.keywords.items():
        if not name.isidentifier() or name in _RESERVED:
            raise UserError(f"--chat_template_kwargs: {name} is no keyword that a template can be told")
        parts.append(f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}")
    parts += {"keep": [], "fold": [_FOLD], "drop": [_DROP]}[options.system_prompt]
    return _BEGIN + "".join(parts) + _END if parts else ""


def _literal(value: Any) -> str:
    """A JSON value in Jinja's notation, which has `none` for `null`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_literal(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _adapted(template: str, prelude: str, day: str | None) -> str:
    if prelude:
        template = prelude + _PRELUDE.sub("", template, count=1)
    if day is None:
        return template
    told = date.fromisoformat(day)
    fixed, count = _NOW.subn(lambda call: json.dumps(told.strftime(call.group(2))), template)
    return f"{{#- {_DAY}{day} -#}}{{{{ '' }}}}{fixed}" if count else template


def day_of_models(names: Iterable[str]) -> str | None:
    """The date that these models' templates write: that of the first whose template was saved with one."""
    for name in names:
        file = Path(name) / "chat_template.jinja"
        if file.is_file() and (found := _TOLD.search(file.read_text(encoding="utf-8", errors="replace"))):
            return found.group(1)
    return None
