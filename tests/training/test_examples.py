"""SFT on rows of one answer: they are read, tokenized and trained as stock SFTTrainer does where both can."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from tandem.data.options import SFTDataOptions
from tandem.engine.pairs import unpacked
from tandem.errors import UserError
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.parsing import parse
from tandem.options.training import GaudiOptions, PlanOptions, SFTOptions
from tandem.training.examples import packed
from tandem.training.option_sets import SFTOptionSet, classes
from tandem.training.plan import plan_run
from tandem.training.stages import run_sft
from tests import tiny

# The tiny template with TRL's marks of what the assistant writes
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(index: int) -> list[dict[str, str]]:
    words = tiny.WORDS[index % 9 : index % 9 + 3 + index % 5]
    turns = [user(f"say {index}"), assistant(" ".join(words))]
    return turns + ([user("again?"), assistant("no, " * (index % 4) + "once")] if index % 2 else [])


CONVERSATIONS = [{"messages": conversation(index)} for index in range(9)]
COMPLETIONS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:2]} for row in CONVERSATIONS]
TEXT_PAIRS = [{"prompt": f"{index} is", "completion": f" {index * 'a b '}c"} for index in range(9)]
TEXTS = [{"text": "the red house " * (1 + index % 4)} for index in range(9)]
COMMON: dict[str, Any] = {
    "bf16": False, "optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "per_device_train_batch_size": 3,
    "save_strategy": "no", "lr_scheduler_type": "constant", "gradient_checkpointing": False,
}  # fmt: skip


def train(rows: list[dict[str, Any]], model: Path, tmp_path: Path, *, chat: bool = True, **given: Any) -> Any:
    """The weights that Tandem's SFT leaves, by name."""
    tmp_path.mkdir(exist_ok=True)
    options = SFTOptions(output_dir=str(tmp_path / "ours"), **(COMMON | given))
    run_sft(
        SFTOptionSet(
            ModelOptions(str(model)),
            LoraOptions(),
            TextOptions(use_chat_template=chat, max_length=64),
            SFTDataOptions(str(tiny.save_pairs(tmp_path / "rows.jsonl", rows))),
            options,
            GaudiOptions(),
        )
    )
    return load_file(tmp_path / "ours" / "model.safetensors")


def train_stock(rows: list[dict[str, Any]], model: Path, tmp_path: Path, **given: Any) -> Any:
    config = SFTConfig(
        output_dir=str(tmp_path / "stock"), max_length=64, use_cpu=True, report_to=[], **(COMMON | given)
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model()
    return load_file(tmp_path / "stock" / "model.safetensors")


def apart(left: Any, right: Any) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    ("rows", "given"),
    [
        (CONVERSATIONS, {}),
        (CONVERSATIONS, {"assistant_only_loss": True}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"completion_only_loss": False, "loss_type": "dft"}),
        (TEXTS, {}),
        (TEXT_PAIRS, {"chat": False}),
    ],
    ids=["conversations", "assistant_only", "completions", "whole_dft", "texts", "text_pairs"],
)
def test_equals_stock_sft_trainer(rows: list[dict[str, Any]], given: dict[str, Any], tmp_path: Path):
    model = tiny.save_model(tmp_path / "model", chat_template=MARKED, tied=False)
    stock = train_stock(rows, model, tmp_path, **{name: given[name] for name in given if name != "chat"})
    ours = train(rows, model, tmp_path, **given)
    before = load_file(model / "model.safetensors")
    assert apart(stock, before) > 1e-3
    assert apart(ours, stock) < 1e-6


def test_packed_rows_train_as_their_examples_would(tmp_path: Path):
    """One step over all examples: the loss is a mean over tokens, so how they lie in rows must not matter."""
    model = tiny.save_model(tmp_path / "model", tied=False)
    one_step = {"max_steps": 1, "per_device_train_batch_size": 9}
    apart_from_each_other = train(CONVERSATIONS, model, tmp_path / "a", layout="padded", **one_step)
    together = train(CONVERSATIONS, model, tmp_path / "b", packing=True, **one_step)
    assert apart(together, apart_from_each_other) < 1e-6
    assert apart(together, load_file(model / "model.safetensors")) > 1e-3


@pytest.mark.parametrize(
    ("strategy", "lengths"), [("bfd", [[10], [7, 3], [5, 4, 1]]), ("bfd_split", [[10], [7, 3], [5, 4, 1], [2]])]
)
def test_rows_are_filled_best_fit_first(strategy: Any, lengths: list[list[int]]):
    """By hand: the longest first, each into the row with the least room that holds it; 12 tokens are cut, or go on."""
    train = SFTOptions(output_dir="out", packing=True, packing_strategy=strategy)
    run = SFTOptionSet(
        ModelOptions("m"), LoraOptions(), TextOptions(max_length=10), SFTDataOptions("d"), train, GaudiOptions()
    )
    rows = [{"input_ids": list(range(length)), "labels": list(range(length))} for length in (3, 12, 1, 7, 5, 4)]
    found = packed(Dataset.from_list(rows), run)
    assert found["seq_lengths"][:] == lengths
    assert [len(example["input_ids"]) for example in unpacked(found)] == [each for row in lengths for each in row]


def test_examples_that_keep_nothing_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny.save_model(tmp_path / "model")
    long = {"prompt": [user("a" * 90)], "completion": [assistant("b")]}
    train([*COMPLETIONS, long], model, tmp_path, max_steps=1)
    assert "1 of 10 examples left out: --max_length keeps none of their answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="--max_length 64: no example keeps any of its answers"):
        train([long, long], model, tmp_path / "none", max_steps=1)


@pytest.mark.parametrize("given", [{}, {"assistant_only_loss": True}, {"completion_only_loss": False}])
def test_answers_that_nothing_ends_are_named(given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A template without an end of turn, and one that writes it: only the first is warned of."""
    rows = COMPLETIONS if "completion_only_loss" in given else CONVERSATIONS
    endless = tiny.save_model(
        tmp_path / "model", chat_template=MARKED.replace("m['content'] + eos_token", "m['content']")
    )
    train(rows, endless, tmp_path / "endless", max_steps=1, **given)
    told = "9 of 9 examples have an answer that no special token ends"
    assert told in capsys.readouterr().err
    train(rows, tiny.save_model(tmp_path / "closed", chat_template=MARKED), tmp_path / "a", max_steps=1, **given)
    assert "that no special token ends" not in capsys.readouterr().err


def test_plan_counts_packed_rows(tmp_path: Path):
    path = tiny.save_pairs(tmp_path / "rows.jsonl", CONVERSATIONS)
    model = tiny.save_model(tmp_path / "model")
    given = f"--model_name_or_path {model} --dataset_name {path} --output_dir out --max_length 64 --plan"
    told = {}
    for flags in ("", "--packing"):
        *options, plan = parse([*given.split(), *flags.split()], (*classes(SFTOptionSet), PlanOptions), prog="sft.py")
        told[flags] = plan_run(SFTOptionSet(*options), plan)
    assert "layout packed" in told[""]
    assert told[""] != told["--packing"]
