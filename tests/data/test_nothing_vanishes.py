"""Rows of the shapes that people train on, mutated: each of their texts is trained, named, or its row is refused.

Every text that a row is made of holds a word of its own, so that a text that is found is that one and no other.
"""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.columns import PROMPTS
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import render
from tandem.data.tokenized import all_placed, tokenize_rows
from tandem.errors import UserError
from tandem.ranks import forget_told
from tests import tiny
from tests.data.test_templates import SHIPPED, SHORT

Json = dict[str, Any]
Path_ = tuple[str | int, ...]  # where in a row a text stands

TEMPLATES: dict[str, str | None] = {
    "tiny": tiny.TEMPLATE,
    "qwen3": SHIPPED["qwen3"],
    "glm4moe": SHIPPED["glm4moe"],
    "zephyr": SHORT["zephyr"],
    "mistral v0.3": SHORT["mistral v0.3"],
    "transcript": None,  # --use_chat_template false
}
RATED = ("completions", "answers")
_WORD = re.compile(r"mk\d+e")


class Words:
    """Texts, each with a word that is in no other."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, around: str = "{}") -> str:
        return around.format(f"mk{next(self._numbers)}e")

    def name(self) -> str:
        """A name that no format knows."""
        return f"extra{next(self._numbers)}"


def user(content: Any, **parts: Any) -> Json:
    return {"role": "user", "content": content, **parts}


def says(content: Any, **parts: Any) -> Json:
    return {"role": "assistant", "content": content, **parts}


def call(w: Words) -> Json:
    return {"id": w(), "type": "function", "function": {"name": w("f_{}"), "arguments": {"city": w(), "n": [w()]}}}


def tool(w: Words) -> Json:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": w()}}}
    return {"type": "function", "function": {"name": w("f_{}"), "description": w(), "parameters": parameters}}


def transcript(w: Words, *roles: str) -> str:
    return "".join(f"\n\n{role}: {w('say {} please')}" for role in roles)


def _hh(w: Words) -> Json:
    shared = transcript(w, "Human", "Assistant", "Human")
    return {side: shared + transcript(w, "Assistant") for side in ("chosen", "rejected")}


def _repeated(w: Words) -> Json:
    question = w("Why {}?")
    answers = {side: [user(question), says(w())] for side in ("chosen", "rejected")}
    return {"prompt": question, "prompt_id": w(), **answers, "messages": answers["chosen"], "score_chosen": 5.0}


def _capybara(w: Words) -> Json:
    shared = [user(w()), says(w()), user(w())]
    return {"source": w(), "chosen": [*shared, says(w())], "rejected": [*shared, says(w())], "rating_chosen": 5}


# Data set → a row as it has them
SHAPES: dict[str, Callable[[Words], Json]] = {
    "hh-rlhf": _hh,
    "hh with a prompt": lambda w: {"prompt": transcript(w, "Human") + "\n\nAssistant:", "chosen": w(), "rejected": w()},
    "text": lambda w: {"prompt": w(), "chosen": w(), "rejected": w()},
    "alpaca": lambda w: {"instruction": w(), "input": w(), "chosen": w(), "rejected": w()},
    "orca": lambda w: {"system": w(), "question": w(), "chosen": w(), "rejected": w()},
    "messages": lambda w: {"prompt": [user(w())], "chosen": [says(w())], "rejected": [says(w())]},
    "ultrafeedback": _repeated,
    "capybara": _capybara,
    "sharegpt": lambda w: {
        "conversations": [{"from": "system", "value": w()}, {"from": "human", "value": w()}],
        "chosen": {"from": "gpt", "value": w()},
        "rejected": {"from": "gpt", "value": w()},
    },
    "openai": lambda w: {"conversations": [user(w())], "chosen": says(w()), "rejected": says(w())},
    "axolotl": lambda w: {"messages": [user(w())], "chosen": says(w()), "rejected": says(w())},
    "tools": lambda w: {
        "tools": [tool(w)],
        "prompt": [user(w()), says(w(), tool_calls=[call(w)]), {"role": "tool", "content": w()}, user(w())],
        "chosen": [says(w(), tool_calls=[call(w)]), {"role": "tool", "content": w(), "name": w()}, says(w())],
        "rejected": [says(w())],
    },
    "reasoning": lambda w: {
        "prompt": [user(w()), says(w(), reasoning_content=w()), user(w())],
        "chosen": [says(w(), reasoning_content=w())],
        "rejected": [says(w(), reasoning_content=w())],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "history": lambda w: {"history": [[w(), w()]], "instruction": w(), "chosen": w(), "rejected": w()},
    "user inside": lambda w: {
        "prompt": w(),
        "chosen": [says(w()), user(w()), says(w())],
        "rejected": [says(w()), user(w()), says(w())],
    },
    "UltraFeedback": lambda w: {
        "instruction": w(),
        "completions": [
            {"response": w(), "overall_score": n, "critique": w(), "annotations": {"a": w()}} for n in (1, 2)
        ],
    },
    "Nectar": lambda w: {"prompt": w(), "answers": [{"answer": w(), "rank": n, "model": w()} for n in (1, 2)]},
}
# Columns that formats, trainers and data sets know, beside those that a row has
COLUMNS = (
    "system", "system_prompt", "input", "context", "contexts", "document", "history", "question", "instruction",
    "query", "prompt", "messages", "conversations", "tools", "chat_template_kwargs", "functions", "images", "video",
    "completion", "response", "output", "answer", "text", "id", "source", "weight", "margin", "label", "Prompt",
    " chosen ", "CHOSEN", "score", "pair_id", "row", "format", "system_message", "thinking", "reasoning_content",
    "chosen_turns", "rejected_turns", "scores", "is_trimmed", "texts", "prompt_ids", "chosen_mask", "dialogue",
)  # fmt: skip
KEYS = ("name", "reasoning_content", "thinking", "tool_call_id", "tool_calls", "function_call", "weight", "prefix",
        "loss", "value", "text", "content", "from", "refusal", "tools", "date", "id", "image")  # fmt: skip


def mutated(draw: st.DrawFn, w: Words, shape: str) -> Json:
    """A row of a shape, changed in up to four places."""
    row = SHAPES[shape](w)
    for _ in range(draw(st.integers(0, 4))):
        _MUTATIONS[draw(st.sampled_from(sorted(_MUTATIONS)))](draw, w, row)
    return row


def value(draw: st.DrawFn, w: Words) -> Any:
    """A text, or what holds some."""
    kind = draw(st.integers(0, 6))
    one = w(draw(st.sampled_from(["{}", " {}\n\n", "{}?", "<b>{}</b>", '[{{"role": "user", "content": "{}"}}]'])))
    made: list[Any] = [
        one, [w(), w()], {w.name(): one, "more": {"deep": [w()]}}, [user(one)], [says(one)], [[w(), w()]],
        [tool(w)],
    ]  # fmt: skip
    return made[kind]


def objects(value: Any) -> Iterator[Json]:
    """All objects inside of a value."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


def _add_column(draw: st.DrawFn, w: Words, row: Json) -> None:
    row[draw(st.one_of(st.just(w.name()), st.sampled_from(COLUMNS)))] = value(draw, w)


def _add_key(draw: st.DrawFn, w: Words, row: Json) -> None:
    inside = list(objects(list(row.values())))
    if inside:
        draw(st.sampled_from(inside))[draw(st.one_of(st.just(w.name()), st.sampled_from(KEYS)))] = value(draw, w)


def turns(row: Json) -> list[Json]:
    return [each for each in objects(list(row.values())) if "role" in each and isinstance(each.get("content"), str)]


def _in_parts(draw: st.DrawFn, w: Words, row: Json) -> None:
    if found := turns(row):
        turn = draw(st.sampled_from(found))
        more = {w.name(): value(draw, w)} if draw(st.booleans()) else {}
        turn["content"] = [{"type": "text", "text": turn["content"]}, {"type": "text", "text": w(), **more}]


def _to_nothing(draw: st.DrawFn, w: Words, row: Json) -> None:
    inside = list(objects(row))
    target = draw(st.sampled_from(inside))
    if target:
        target[draw(st.sampled_from(sorted(target)))] = draw(st.sampled_from([None, "", " ", [], {}, 7]))


def _as_json(draw: st.DrawFn, w: Words, row: Json) -> None:
    lists = sorted(name for name, part in row.items() if isinstance(part, list | dict))
    if lists:
        name = draw(st.sampled_from(lists))
        row[name] = json.dumps(row[name])


def _renamed(draw: st.DrawFn, w: Words, row: Json) -> None:
    name = draw(st.sampled_from(sorted(row)))
    row[draw(st.sampled_from([name.upper(), name.title(), f" {name} "]))] = row.pop(name)


def _struct(draw: st.DrawFn, w: Words, row: Json) -> None:
    lists = sorted(
        name for name, part in row.items() if isinstance(part, list) and all(isinstance(x, dict) for x in part)
    )
    if lists:
        name = draw(st.sampled_from(lists))
        keys = sorted({key for item in row[name] for key in item})
        row[name] = {key: [item.get(key) for item in row[name]] for key in keys}


def _insert_turn(draw: st.DrawFn, w: Words, row: Json) -> None:
    lists = sorted(name for name, part in row.items() if isinstance(part, list) and part and isinstance(part[0], dict))
    if lists:
        turns = row[draw(st.sampled_from(lists))]
        role = draw(st.sampled_from(["system", "user", "assistant", "tool", "developer", "human", "model", "critic"]))
        keys = ("from", "value") if "from" in turns[0] else ("role", "content")
        turns.insert(draw(st.integers(0, len(turns))), {keys[0]: role, keys[1]: w()})


def _say_again(draw: st.DrawFn, w: Words, row: Json) -> None:
    """Answers that begin with the prompt as text."""
    if isinstance(row.get("prompt"), str):
        for side in ("chosen", "rejected")[: draw(st.integers(1, 2))]:
            if isinstance(row.get(side), str):
                row[side] = row["prompt"] + " " + row[side]


_MUTATIONS: dict[str, Callable[[st.DrawFn, Words, Json], None]] = {
    "column": _add_column, "another column": _add_column, "key": _add_key, "another key": _add_key,
    "parts": _in_parts, "nothing": _to_nothing, "json": _as_json, "name": _renamed, "struct": _struct,
    "turn": _insert_turn, "again": _say_again,
}  # fmt: skip


def located(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    """The words of every text in `value`, and where they stand; of JSON in a text, where in that."""
    if isinstance(value, str):
        if value.lstrip()[:1] in ("[", "{"):
            try:
                yield from located(json.loads(value), path)
                return
            except ValueError:
                pass
        yield from ((path, word) for word in _WORD.findall(value))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from located(part, (*path, name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from located(part, (*path, index))


def names_in(said: str) -> set[str]:
    """Columns and keys that the lines on stderr name as not read, or as left out by the template."""
    names = set()
    for line in said.splitlines():
        for part in line.partition("; NOT read: ")[2].split("; "):
            names.add(part.rpartition(": ")[0].replace(", left out by --ignore_columns", ""))
        template = re.match(r"the chat template leaves out, of \d+ pairs: (.*)", line)
        for part in template.group(1).split(", ") if template else ():
            names.add(part.rpartition(" in ")[0])
    return {name.replace("[]", "").strip() for name in names} - {""}


def is_named(path: Path_, given: set[str]) -> bool:
    """Whether the text at `path` is named: its column, or a key on the way with those before it."""
    column, *keys = [part for part in path if isinstance(part, str)]
    runs = itertools.combinations(range(len(keys) + 1), 2)
    forms = {"." + ".".join(keys[start:end]) for start, end in runs}
    forms |= {".".join([column, *keys[:end]]) for end in range(len(keys) + 1)}
    return not ({name.strip() for name in forms} | {column.strip().lower()}).isdisjoint(given)


def examine(rows: list[Json], template: str | None, folder: Path) -> str:
    """What became of a file of these rows: refused or trained.

    Raises:
        AssertionError: a text is in no sequence where it should be, and no line names it.
    """
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tiny.tokenizer(template)
    forget_told()
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            pairs = load_pairs(DataOptions(str(file)), "train")
            rendered = all_placed(pairs, lambda pair: render(pair, template is not None))
            tokens = tokenize_rows(rendered, text)
    except UserError as error:
        assert str(file) in str(error), f"refused, but not by name: {error}"
        return "refused"
    said = stderr.getvalue()
    names = names_in(said)
    unused = re.search(r"; (\d+) answers? in no pair", said)
    without = re.search(r"none from (\d+) prompts?", said)  # rated rows that give no pair, counted with the reason
    in_no_pair, no_pairs = set(), set()
    sequences = [Sequences(pair, text) for pair in tokens]
    for number, row in enumerate(rows):
        for path, word in located(row):
            if any(found.has(path, word) for found in sequences) or is_named(path, names):
                continue
            assert not {*RATED}.isdisjoint(row) and (unused or without), (path, word, said, list(map(vars, sequences)))
            if path[0] in RATED:
                in_no_pair.add((number, path[1]))
            else:
                no_pairs.add(number)
        assert_only_own_turns(row, sequences)
    assert len(in_no_pair) <= int(unused.group(1) if unused else 0), (in_no_pair, said)
    assert len(no_pairs) <= int(without.group(1) if without else 0), (no_pairs, said)
    return "trained"


class Sequences:
    """What a tokenized pair says: all that the model reads, by side, and what of it is trained."""

    def __init__(self, pair: dict[str, list[int]], text: Any) -> None:
        self.prompt = str(text.decode(pair["prompt_ids"]))
        self.whole, self.trained = {}, {}
        for side in ("chosen", "rejected"):
            ids = pair[f"{side}_ids"]
            own = pair.get(f"{side}_mask", [1] * len(ids))
            self.whole[side] = self.prompt + text.decode(ids)
            self.trained[side] = text.decode([token for token, its in zip(ids, own, strict=True) if its])

    def has(self, path: Path_, word: str) -> bool:
        """Whether a word is where its column belongs: in the sequence of its answer, in both, or in one of a rating."""
        column = str(path[0]).strip().lower()
        if column in self.whole:
            return word in self.whole[column]
        return (any if column in RATED else all)(word in whole for whole in self.whole.values())


def assert_only_own_turns(row: Json, sequences: list[Sequences]) -> None:
    """An assistant's words in an answer are trained, those of others in it are not."""
    for side in ("chosen", "rejected"):
        answer = row.get(side)
        for turn in answer if isinstance(answer, list) else ():
            role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
            content = turn.get("content", turn.get("value")) if role else None
            for word in _WORD.findall(content) if isinstance(content, str) else ():
                for found in sequences:
                    if word in found.whole[side] and word not in found.prompt:
                        is_own = role in ("assistant", "gpt", "model")
                        assert (word in found.trained[side]) == is_own, (side, word, role, vars(found))


@st.composite
def files(draw: st.DrawFn) -> list[Json]:
    """One or two rows of a shape."""
    words, shape = Words(), draw(st.sampled_from(sorted(SHAPES)))
    return [mutated(draw, words, shape) for _ in range(draw(st.integers(1, 2)))]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(rows=files(), template=st.sampled_from(sorted(TEMPLATES)))
def test_each_text_is_trained_or_named_or_its_row_refused(rows: list[Json], template: str, tmp_path_factory: Any):
    examine(rows, TEMPLATES[template], tmp_path_factory.getbasetemp())


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, database=None)
@given(rows=files(), template=st.sampled_from(sorted(TEMPLATES)))
def test_it_is_so_with_thousands_of_others(rows: list[Json], template: str, tmp_path_factory: Any):
    examine(rows, TEMPLATES[template], tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_as_data_sets_have_them_are_trained(shape: str, tmp_path: Path):
    assert examine([SHAPES[shape](Words())], SHIPPED["qwen3_training"], tmp_path) == "trained"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [4, True, {"other": "mk9e"}, [["mk9e"]]], ids=repr)
def test_a_column_of_another_kind_is_read_named_or_refused(shape: str, value: Any, tmp_path: Path):
    row = SHAPES[shape](Words())
    for column in {*row, *PROMPTS, "input", "system", "history", "messages", "tools"}:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row | {column: value}) + "\n")
        forget_told()
        try:
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                pairs = load_pairs(DataOptions(str(file)), "train")
        except UserError as error:
            assert str(file) in str(error)
            continue
        is_read = "mk9e" in json.dumps([dict(pair) for pair in pairs])
        assert is_read or column in stderr.getvalue().partition("NOT read")[2], (column, stderr.getvalue())
