"""What the judge is asked: comparisons, the prompts rendered from them, and the key of each call."""

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
    """Two answers to one prompt. Side 2 is the one that is scored: the tuned model's, or the one humans chose."""

    prompt_id: str
    messages: Sequence[Mapping[str, Any]]  # the conversation so far: role, content
    answer_1: str
    answer_2: str
    label_1: str
    label_2: str
    non_answer_1: str | None = None  # why a side is no whole answer (`data.non_answers`)
    non_answer_2: str | None = None

    @property
    def identical(self) -> bool:
        """A tie at no cost."""
        return self.answer_1 == self.answer_2


@dataclasses.dataclass(frozen=True)
class Call:
    """One verdict to be had. Calls with equal keys are one call."""

    key: str
    kind: Kind
    comparison: Comparison
    order: Order
    sample: int
    messages: list[dict[str, str]]

    @property
    def free(self) -> bool:
        """Identical answers are a tie and nobody is asked, unless it is the judge that is tried on them."""
        return _is_free(self.kind, self.comparison)

    @property
    def identity(self) -> dict[str, Any]:
        """What a line of verdicts.jsonl says about the call, besides the verdict."""
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
    """Everything but the comparison that a verdict depends on."""

    base_url: str
    model: str
    schema_enforced: bool  # else the schema is asked for in words, with worked examples
    temperature: float | None
    max_output_tokens: int
    code: str | None = None  # of a backend of the user's own, its version

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters by their names in the Responses API; one that is unset is left to the server."""
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
            content["free"] = True  # not to be taken for the judge's own verdict on the same text
        return Call(sha256_json(content), kind, comparison, order, sample, messages)

    def request(self, messages: Sequence[Mapping[str, Any]]) -> Request:
        """What the server is asked, in no form yet."""
        return Request(
            self.model,
            messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            schema=verdict_schema() if self.schema_enforced else None,
        )


def text_digest(text: str) -> str:
    """Tells whether an answer is still the one that was judged."""
    return sha256_json(text)[:16]


def verdict_schema() -> dict[str, Any]:
    """`Verdict` as a strict output format."""
    return {"strict": True, "name": Verdict.__name__, "schema": Verdict.model_json_schema()}


def render(comparison: Comparison, order: Order, *, worked_examples: bool) -> list[dict[str, str]]:
    """The chat messages that ask for a verdict, answer 1 as A if `order` is "12".

    With `worked_examples` the reply's form is shown by example, as earlier turns: small models that are asked for JSON
    in words alone seldom give any.
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


# Tags of the judge's own prompt, and the marks with which chat templates separate turns: a local server's tokenizer
# may take them for control tokens wherever they stand.
_DELIMITERS = re.compile(
    r"(<)(?=\s*/?\s*(?:conversation|turn|answer_[ab])\b"
    r"|\||\uff5c|/?s>|<?/?SYS>|(?:start|end)_of_turn>|/?(?:bos|eos|pad|unk|think)>)"
    r"|(\[)(?=/?INST\])",
    re.IGNORECASE,
)


def neutralise(text: Any) -> str:
    """Judged text with every delimiter broken by a space, so that it cannot end its block and speak as another.

    Lone surrogates, which no server can be sent, become question marks.
    """
    return _DELIMITERS.sub(lambda match: match[0] + " ", str(text).encode(errors="replace").decode())


@functools.cache
def _prompt_file(name: str) -> str:
    return (resources.files(__package__) / "prompts" / f"{PROMPT_VERSION}_{name}").read_text(encoding="utf-8").strip()


@functools.cache
def _template() -> jinja2.Template:
    # `finalize` sees every value that is put in, so that none can be forgotten
    environment = jinja2.Environment(
        finalize=neutralise, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.from_string(_prompt_file("question.jinja"))
