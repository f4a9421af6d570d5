"""People's labels on some of the compared pairs: the page that asks for them, and the file that it saves.

`label.html` shows pairs in a random order, the answers as A and B without names; which side is A is drawn for each
pair. The file has a line a label: `prompt_id`, `verdict` (A, B or tie), `a` and `b` (digests of the answers shown),
`annotator`. The page does not say which model an answer is from; the digests tell it later.
"""

import base64
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tandem.data.files import read_rows
from tandem.data.rows import Row, RowError
from tandem.errors import UserError
from tandem.judge.requests import Comparison, text_digest
from tandem.runs import sha256_json, write_atomic

PAGE = "label.html"


def draw(comparisons: Sequence[Comparison], seed: int) -> list[Comparison]:
    """The pairs whose answers differ, in a random order: the first n of them are a random subset, for any n."""
    differing = [pair for pair in comparisons if not pair.identical]
    random.Random(f"{seed} labels").shuffle(differing)
    return differing


def write_page(folder: Path, comparisons: Sequence[Comparison], count: int, seed: int) -> None:
    """Write `label.html` with at most `count` pairs. Answers are shown as plain text: nothing in them is run."""
    pairs = [_shown(pair, seed) for pair in draw(comparisons, seed)[:count]]
    templates = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": True}
    script = _source("label.js")
    html = templates.from_string(_source("label.html.jinja")).render(
        pairs=pairs,
        key=sha256_json(pairs)[:16],
        style=Markup(_source("label.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomic(folder / PAGE, html.encode("utf-8", errors="replace"))


def _source(name: str) -> str:
    return (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _shown(pair: Comparison, seed: int) -> dict[str, Any]:
    answers = [pair.answer_1, pair.answer_2]
    if random.Random(f"{seed} side of {pair.prompt_id}").random() < 0.5:
        answers.reverse()
    return {
        "prompt_id": pair.prompt_id,
        "messages": [{"role": str(turn["role"]), "content": str(turn["content"] or "")} for turn in pair.messages],
        "answers": answers,
        "digests": [text_digest(answer) for answer in answers],
    }


def read_labels(file: str | Path, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """People's score of side 2 by prompt id: better 1, neither ½, worse 0; the mean where several people labelled it.

    Of two labels by one annotator on one pair, the later one counts.

    Raises:
        UserError: the file cannot be read, a line is no label, or it is on answers that are not compared here.
    """
    pairs = {pair.prompt_id: pair for pair in comparisons}
    found: dict[str, dict[str, float]] = {}
    for number, label in _lines(file):
        where = f"--human_labels {file} line {number}"
        key, verdict = label.get("prompt_id"), label.get("verdict")
        if not isinstance(key, str) or key not in pairs:
            raise UserError(f"{where}: prompt_id {key!r} is none of the compared prompts")
        if verdict not in ("A", "B", "tie"):
            raise UserError(f"{where}: verdict must be A, B or tie, not {verdict!r}")
        score = _score(verdict, (label.get("a"), label.get("b")), pairs[key])
        if score is None:
            raise UserError(f"{where}: a label on other answers to this prompt than those compared; label it anew")
        found.setdefault(key, {})[str(label.get("annotator") or "")] = score
    return {key: sum(scores.values()) / len(scores) for key, scores in found.items()}


def _score(verdict: str, shown: tuple[Any, Any], pair: Comparison) -> float | None:
    sides = [text_digest(pair.answer_1), text_digest(pair.answer_2)]
    if sorted(map(str, shown)) != sorted(sides):
        return None
    if verdict == "tie" or pair.identical:
        return 0.5
    return float(shown["AB".index(verdict)] == sides[1])


def _lines(file: str | Path) -> Iterator[tuple[int, Row]]:
    found = False
    for number, row in read_rows(Path(file)):
        if isinstance(row, RowError):
            raise UserError(
                f"--human_labels {file} line {number}: {row}; label.html in the judge's folder saves labels"
            )
        found = True
        yield number, row
    if not found:
        raise UserError(f"--human_labels {file}: no label in it")


def is_first_part(labels: Mapping[str, float], comparisons: Sequence[Comparison], seed: int) -> bool:
    """Whether the labelled pairs are the first ones of the page, which makes them a random subset."""
    asked = {pair.prompt_id for pair in draw(comparisons, seed)[: len(labels)]}
    return labels.keys() <= asked
