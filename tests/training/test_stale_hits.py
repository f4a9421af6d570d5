"""A search for stale hits: one cache of log-probs and one of token ids under hundreds of random settings, against fresh
ones for each of them.

A setting differs from the one before in a few places, as those of a person at work do. The shared cache holds the
entries of all settings before it, so each is tried against all of them. What it gives must be what a fresh cache gives,
up to the rounding of another batch or layout. Quantization needs a GPU and is left out.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tandem.options.parsing import parse
from tandem.training.option_sets import DPOOptionSet, check, classes
from tandem.training.stages import fill_reference_cache
from tandem.training.trainers.reference_scorer import ReferenceScorer
from tests import tiny
from tests.adapters import save_kind

PAIRS = 6
# Nats, of answers of 5 to 40 tokens: sums in another order; in bfloat16 its 3 digits of logits
ROUNDING = {"float32": 1e-3, "bfloat16": 1.0}
Scored = np.ndarray
"""(PAIRS or less, 2): log-probs of the reference for chosen and rejected answers, in nats."""


def save_adapters(folder: Path, model: Path) -> list[Path]:
    """Adapters that differ in one thing each: their kind, one setting, or their weights."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "lora": ("lora", {}),
        "dropout": ("lora", {"lora_dropout": 0.5}),
        "other_weights": ("lora", {"seed": 1}),
        "dora": ("dora", {}),
        "embeddings": ("embeddings", {}),
        "tokens": ("tokens", {}),
        "loha": ("loha", {}),
        "ia3": ("ia3", {}),
        "pissa": ("pissa", {}),
    }
    made = [save_kind(folder / name, model, kind, **changes) for name, (kind, changes) in kinds.items()]
    for name, change in {
        "alpha": {"lora_alpha": 64},
        "rslora": {"use_rslora": True},
        "pattern": {"alpha_pattern": {"q_proj": 64}},
    }.items():
        changed = shutil.copytree(folder / "lora", folder / name)
        config = json.loads((changed / "adapter_config.json").read_text()) | change
        (changed / "adapter_config.json").write_text(json.dumps(config))
        made.append(changed)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "lora").merge_and_unload()
    whole.save_pretrained(folder / "merged")
    tiny.tokenizer().save_pretrained(folder / "merged")
    return [*made, folder / "merged"]


def save_variants(folder: Path, model: Path) -> list[Path]:
    """The same weights under another configuration, or held in another type."""
    changes: dict[str, dict[str, Any]] = {
        "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "eps": {"rms_norm_eps": 1e-2},
    }
    for name, change in changes.items():
        shutil.copytree(model, folder / name)
        config = json.loads((folder / name / "config.json").read_text()) | change
        (folder / name / "config.json").write_text(json.dumps(config))
    half = folder / "half"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    tiny.tokenizer().save_pretrained(half)
    return [*(folder / name for name in changes), half]


def save_tokenizers(folder: Path) -> list[Path]:
    """Another template, and another numbering of the same bytes."""
    spaced = tiny.tokenizer(tiny.TEMPLATE.replace("'|>' +", "'|> ' +"))
    spaced.save_pretrained(folder / "template")
    shifted = json.loads((folder / "template" / "tokenizer.json").read_text())
    vocabulary = shifted["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    shutil.copytree(folder / "template", folder / "numbers")
    (folder / "numbers" / "tokenizer.json").write_text(json.dumps(shifted))
    return [folder / "template", folder / "numbers"]


@pytest.fixture
def choices(tmp_path: Path, tiny_data: Path) -> dict[str, list[Any]]:
    """Values of each option; None: left out."""
    model, tied = tiny.save_model(tmp_path / "model", tied=False), tiny.save_model(tmp_path / "tied", seed=1)
    starts = [model, tied, *save_variants(tmp_path, model), *save_adapters(tmp_path, model)]
    return {
        "model_name_or_path": starts,
        "tokenizer_name_or_path": [None, None, *save_tokenizers(tmp_path)],
        "reference_model": [None, None, None, *starts],
        "disable_dropout": [None, "false"],
        "use_chat_template": [None, "false"],
        "max_length": [None, 40, 34],
        "dtype": [None, None, "bfloat16"],
        "ld_alpha": [None, None, 0.5, 0.0],
        "layout": [None, "packed", "padded"],
        "per_device_train_batch_size": [2, 4],
        "use_peft": [None, "true"],
        "seed": [None, 7],
    }


def settings(choices: dict[str, list[Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    chosen = {name: values[0] for name, values in choices.items()}
    for _ in range(count):
        for name in draw.sample(sorted(choices), draw.choice((1, 1, 2, 3))):
            chosen[name] = draw.choice(choices[name])
        given = {name: value for name, value in chosen.items() if value is not None}
        is_adapter = (Path(given["model_name_or_path"]) / "adapter_config.json").exists()
        if is_adapter:
            given.pop("use_peft", None)
        elif "use_peft" not in given:  # all weights are never held in half precision
            given.pop("dtype", None)
        yield given


@pytest.fixture
def score(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any], Path], tuple[Scored, int]]:
    """`score(setting, cache)`: the reference's log-probs, and how many pairs were forwarded for them."""
    columns: list[Scored] = []
    forwarded: list[int] = []
    with_columns, forward = ReferenceScorer.with_columns, ReferenceScorer.logps

    def kept(self: Any, *arguments: Any) -> Any:
        dataset = with_columns(self, *arguments)
        columns.append(np.array([dataset["ref_chosen_logps"], dataset["ref_rejected_logps"]]).T)
        return dataset

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        forwarded.append(len(inputs["input_ids"]) // 2)
        return forward(self, model, inputs)

    monkeypatch.setattr(ReferenceScorer, "with_columns", kept)
    monkeypatch.setattr(ReferenceScorer, "logps", counted)

    def run(setting: dict[str, Any], cache: Path) -> tuple[Scored, int]:
        columns.clear()
        forwarded.clear()
        given = {"dataset_name": tiny_data, "output_dir": tmp_path / "out", "ref_cache": cache, "bf16": "false"}
        given |= {"token_cache": cache.with_suffix(".tokens")}
        given |= {"max_train_samples": PAIRS, "gradient_checkpointing": "false"} | setting
        argv = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        run_options = DPOOptionSet(*parse(argv, classes(DPOOptionSet), prog="dpo.py", check=check))
        fill_reference_cache(run_options, part=0, parts=1)
        return columns[0], sum(forwarded)

    return run


def search(choices: dict[str, list[Any]], score: Any, folder: Path, count: int) -> tuple[int, int]:
    """How many pairs the shared cache had, and how many were asked of it."""
    hits = asked = 0
    for number, setting in enumerate(settings(choices, count, seed=0)):
        warm, forwarded = score(setting, folder / "shared")
        cold, _ = score(setting, folder / f"own{number}")
        for own in folder.glob("own*"):
            shutil.rmtree(own)
        difference = float(np.abs(warm - cold).max())
        assert difference <= ROUNDING[setting.get("dtype", "float32")], (number, setting, difference)
        hits += len(warm) - forwarded
        asked += len(warm)
    return hits, asked


def test_a_few(choices: dict[str, list[Any]], score: Any, tmp_path: Path):
    search(choices, score, tmp_path, count=6)


@pytest.mark.slow
def test_five_hundred(choices: dict[str, list[Any]], score: Any, tmp_path: Path):
    hits, asked = search(choices, score, tmp_path, count=500)
    assert 0.2 * asked < hits < asked  # it is a cache, and not of one setting
