"""What the judge is asked: comparisons, the prompts that are rendered from them, and the key of each call."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, Literal

import jinja2

from tandem.judge.verdicts import ORDERS, Order, Verdict
from tandem.runs import sha256_json
from tandem.servers.dialects import Request

PROMPT_VERSION = "v1"
ROLES = ("system", "user", "assistant", "tool")

Kind = Literal["labelled", "self", "main"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt. Side 2 is the one that is scored: the tuned model's, or the one that people chose."""

    prompt_id: str
    messages: Sequence[Mapping[str, Any]]  # the prompt, as a conversation: role, content
    answer_1: str
    answer_2: str
    label_1: str
    label_2: str
    non_answer_1: str | None = None  # why the side's text is no whole answer (`data.non_answers`)
    non_answer_2: str | None = None

    @property
    def identical(self) -> bool:
        """Whether both answers are the same: a tie, which costs nothing."""
        return self.answer_1 == self.answer_2


@dataclasses.dataclass(frozen=True)
class Call:
    """One verdict that is asked for. Calls with equal keys are the same call."""

    key: str
    kind: Kind
    comparison: Comparison
    order: Order
    sample: int
    messages: list[dict[str, str]]

    @property
    def free(self) -> bool:
        """Whether it is a tie without asking: answers are identical, and it is no test of how the judge takes that."""
        return _is_free(self.kind, self.comparison)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a line of verdicts.jsonl that say which call it is of."""
        shown = (self.comparison.label_1, self.comparison.label_2)
        a, b = shown if self.order == "12" else shown[::-1]
        return {
            "key": self.key,
            "kind": self.kind,
            "prompt_id": self.comparison.prompt_id,
            "order": self.order,
            "sample": self.sample,
            "a": a,
            "b": b,
        }


def _is_free(kind: Kind, comparison: Comparison) -> bool:
    return comparison.identical and kind != "self"


@dataclasses.dataclass(frozen=True)
class Judge:
    """All that a verdict depends on besides the comparison."""

    base_url: str
    model: str
    schema_enforced: bool  # whether the server enforces it; else the form is described in words, with worked examples
    temperature: float | None
    max_output_tokens: int
    code: str | None = None  # the digest of the user's own backend, if it is one (`objects.version_of`)

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters by their names in the Responses API. One that is unset is missing: the server decides."""
        given = {"temperature": self.temperature, "max_output_tokens": self.max_output_tokens}
        return {name: value for name, value in given.items() if value is not None}

    def calls(self, kind: Kind, comparisons: Iterable[Comparison], samples: int) -> list[Call]:
        """Every comparison in both orders, `samples` times."""
        return [
            self._call(kind, comparison, order, sample)
            for comparison in comparisons
            for order in ORDERS
            for sample in range(samples)
        ]

    def _call(self, kind: Kind, comparison: Comparison, order: Order, sample: int) -> Call:
        messages = render(comparison, order, worked_examples=not self.schema_enforced)
        content = {
            "base_url": self.base_url,
            "model": self.model,
            "messages": messages,
            "schema": {"type": "json_schema", **verdict_schema()} if self.schema_enforced else None,
            "sampling": self.sampling,
            "order": order,
            "sample": sample,
        }
        if self.code is not None:
            content["code"] = self.code
        if _is_free(kind, comparison):
            content["free"] = True  # the key must differ from that of the judge's own verdict on the same text
        return Call(sha256_json(content), kind, comparison, order, sample, messages)

    def request(self, messages: Sequence[Mapping[str, Any]]) -> Request:
        """The request to the server, in neither form of the interface yet."""
        return Request(
            self.model,
            messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            schema=verdict_schema() if self.schema_enforced else None,
        )


def text_digest(text: str) -> str:
    """A digest of an answer's text, by which it is known again."""
    return sha256_json(text)[:16]


def verdict_schema() -> dict[str, Any]:
    """The schema of `Verdict`, in the form of strict structured output."""
    return {"strict": True, "name": Verdict.__name__, "schema": Verdict.model_json_schema()}


def render(comparison: Comparison, order: Order, *, worked_examples: bool) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict, answer 1 as A if `order` is "12".

    With `worked_examples`, earlier turns show the reply's form by example: small models seldom write JSON when only
    told to.
    """
    a, b = (comparison.answer_1, comparison.answer_2)[:: 1 if order == "12" else -1]
    question = {"role": "user", "content": _question(comparison.messages, a, b)}
    system = _prompt_file("system.txt")
    if not worked_examples:
        return [{"role": "system", "content": system}, question]
    shown = []
    for example in json.loads(_prompt_file("examples.json")):
        asked = _question(example["messages"], example["answer_a"], example["answer_b"])
        answer = json.dumps(example["reply"], ensure_ascii=False)
        shown += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system + "\n\n" + _prompt_file("json.txt")}, *shown, question]


def _question(messages: Sequence[Mapping[str, Any]], answer_a: str, answer_b: str) -> str:
    turns = [
        {"role": turn["role"] if turn["role"] in ROLES else "other", "content": turn["content"] or ""}
        for turn in messages
    ]
    return _template().render(turns=turns, answer_a=answer_a, answer_b=answer_b)


# Tags of the judge's own prompt, and the control tokens with which chat templates separate turns, which a local
# server's tokenizer may accept anywhere in a text
_DELIMITERS = re.compile(
    r"(<)(?=\s*/?\s*(?:conversation|turn|answer_[ab])\b"
    r"|\||\uff5c|/?s>|<?/?SYS>|(?:start|end)_of_turn>|/?(?:bos|eos|pad|unk|think)>)"
    r"|(\[)(?=/?INST\])",
    re.IGNORECASE,
)


def neutralise(text: Any) -> str:
    """Judged text with a space in every delimiter, so that it cannot close its block and pose as another speaker.

    Lone surrogates, which cannot be sent in a request, become question marks.
    """
    return _DELIMITERS.sub(lambda match: match[0] + " ", str(text).encode(errors="replace").decode())


@functools.cache
def _prompt_file(name: str) -> str:
    return (resources.files(__package__) / "prompts" / f"{PROMPT_VERSION}_{name}").read_text(encoding="utf-8").strip()


@functools.cache
def _template() -> jinja2.Template:
    # `finalize` is applied to every value that the template inserts, so that none is forgotten
    environment = jinja2.Environment(
        finalize=neutralise, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.from_string(_prompt_file("question.jinja"))
