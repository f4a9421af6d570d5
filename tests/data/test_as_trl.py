"""The tokens of TRL's own DPOTrainer, for rows of all formats, wherever it does not warn of what it makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from trl import DPOConfig, DPOTrainer

from tandem.data.options import DataOptions
from tandem.data.rendering import TemplateFault
from tandem.data.sources import load_pairs
from tandem.data.texts import render, tokenize_pair
from tests import tiny
from tests.data.test_nothing_vanishes import SHAPES, Words
from tests.data.test_templates import SHIPPED, SHORT
from tests.data.test_texts import merging

TEMPLATES = {
    "qwen3_training": SHIPPED["qwen3_training"],
    "llama3": SHIPPED["llama3"],
    "gemma3": SHIPPED["gemma3"],
    "zephyr": SHORT["zephyr"],
    "mistral v0.3": SHORT["mistral v0.3"],
}
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# What TRL trains in silence, and is refused here: TRL looks neither at what a template leaves out nor at inner turns
BEYOND_TRL = ("the chat template leaves out", "the chat template renders turn")


class Rows(list[Any]):
    """As much of a `datasets.IterableDataset` as TRL asks of one."""

    def map(self, made: Callable[..., Any], fn_kwargs: Any = None, **_: Any) -> "Rows":
        """Each row with what `made` adds to it."""
        return Rows({**row, **made(row, **(fn_kwargs or {}))} for row in self)


def by_trl(rows: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, list[int]], bool]:
    """What DPOTrainer makes of one row, and whether it warned."""
    warned: list[str] = []
    logger = SimpleNamespace(warning_once=warned.append)
    monkeypatch.setattr("trl.trainer.dpo_trainer.logger", logger)
    arguments = DPOConfig(output_dir="unused", max_length=None, use_cpu=True, bf16=False)
    stand_in: Any = SimpleNamespace(_tokenizer=tokenizer)
    [made] = DPOTrainer._prepare_dataset(stand_in, rows, tokenizer, arguments, "train")
    return {name: made[name] for name in IDS}, bool(warned)


def tokenizer_of(name: str, template: str | None) -> Any:
    text = tiny.tokenizer() if name == "bytes" else merging()
    text.chat_template = template
    return text


def pair_of(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    [pair] = load_pairs(DataOptions(str(file)), "train")
    return pair


def is_as_trl(ours: dict[str, Any], theirs: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the rendered row `ours` gets the tokens that TRL makes of `theirs`; if not, TRL warned or had failed.

    Raises:
        AssertionError: TRL makes others, and says nothing; or we refuse what TRL trains rightly.
    """
    try:
        made, warned = by_trl(theirs, tokenizer, monkeypatch)
    except TemplateError:
        with pytest.raises(TemplateFault, match="the chat template refuses it"):
            tokenize_pair(ours, tokenizer)
        return False
    try:
        pair = tokenize_pair(ours, tokenizer)
    except TemplateFault as fault:
        assert warned or fault.said.startswith(BEYOND_TRL), fault
        return False
    if not warned:
        assert {name: pair[name] for name in IDS} == made
    return not warned


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", ["bytes", "merging"])
def test_conversations_of_all_formats(template: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = tokenizer_of(tokenizer, TEMPLATES[template])
    rows = [render(pair_of(make(Words()), tmp_path), use_chat_template=True) for make in SHAPES.values()]
    alike = [is_as_trl(row, Rows([row]), text, monkeypatch) for row in rows]
    assert sum(alike) >= 10


# Rows that TRL reads itself → whether they are conversations
OWN = {"messages": True, "capybara": True, "reasoning": True, "text": False, "hh with a prompt": False}


@pytest.mark.parametrize("shape", OWN)
def test_rows_that_trl_reads_itself(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    is_conversation = OWN[shape]
    row = SHAPES[shape](Words())
    if not is_conversation:  # as transcripts have it, between "Assistant:" and the answer
        row |= {side: f" {row[side]}" for side in ("chosen", "rejected")}
    ours = render(pair_of(row, tmp_path), use_chat_template=is_conversation)
    texts = [tokenizer_of(name, template) for name in ("bytes", "merging") for template in TEMPLATES.values()]
    alike = [is_as_trl(ours, Dataset.from_list([row]), text, monkeypatch) for text in texts]
    assert sum(alike) >= 2


@pytest.mark.parametrize("tokenizer", ["bytes", "merging"])
def test_transcripts_of_all_formats(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`--use_chat_template false`: all but what no transcript can hold, which is refused."""
    text, alike = tokenizer_of(tokenizer, None), 0
    for shape, make in SHAPES.items():
        pair = pair_of(make(Words()), tmp_path)
        if shape in ("tools", "reasoning"):
            with pytest.raises(TemplateFault, match="cannot be written as a transcript"):
                render(pair, use_chat_template=False)
            continue
        row = render(pair, use_chat_template=False)
        alike += is_as_trl(row, Rows([row]), text, monkeypatch)
    assert alike >= (len(SHAPES) - 2 if tokenizer == "bytes" else 5)
