"""Where an answer ends: the token with which a chat template ends a turn, found in what it renders."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from tandem.answers.backends.base import read_answer
from tandem.data.turn_end import turn_end
from tandem.models.merge import MergeOptions, merge
from tandem.models.scorer import load_scorer
from tests import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ONE = "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ m['content'] }}"
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 2": ("{% for m in messages %}{{ ' [INST] ' + m['content'] + ' ' + eos_token }}{% endfor %}", "</s>"),
    "only the last turn ends the answer": (
        ONE + "{{ '<|return|>' if loop.last else '<|im_end|>' }}{% endfor %}",
        "<|return|>",
    ),
    "after a thought": (
        ONE + "{{ '\\n</think>' + (m['content'] | trim) + '\\n<|im_end|>\\n' }}{% endfor %}",
        "<|im_end|>",
    ),
    "a token that is not special": (ONE + "{{ '<|end|>' }}{% endfor %}", "<|end|>"),
    "the longer of two": (ONE + "{{ '<|end|>x' }}{% endfor %}", "<|end|>x"),
    "nothing": (ONE + "{% endfor %}", None),
    "words": (ONE + "{{ '\\n### End' }}{% endfor %}", None),
    "no such conversation": ("{{ raise_exception('no') }}", None),
    "none": (None, None),
}


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """Its end of sequence is `</s>`."""
    text = tiny.tokenizer(template)
    text.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|return|>"]})
    text.add_tokens([AddedToken("<|end|>", special=False), AddedToken("<|end|>x", special=False)])
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_is_what_the_template_renders(name: str):
    template, end = TEMPLATES[name]
    text = chat_tokenizer(template)
    found = turn_end(text)
    assert found is None if end is None else text.convert_ids_to_tokens(found) == end


def test_the_token_that_ends_an_answer_is_no_part_of_it():
    text = chat_tokenizer()
    ends = text.convert_tokens_to_ids(["<|end|>"])
    answer = read_answer([*text("the cat")["input_ids"], *ends], text, ends)
    assert (answer.text, answer.finish_reason) == ("the cat", "stop")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that knows its end of sequence alone, as its generation config says, with a template of ChatML."""
    text = chat_tokenizer()
    folder = tiny.save_model(tmp_path_factory.mktemp("ends") / "base", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(text), mean_resizing=False)
    model.save_pretrained(folder)
    text.save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, script: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned to answer `xyz`."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"say {word}", "chosen": "xyz", "rejected": "no"} for word in tiny.WORDS]
    data = tiny.save_pairs(folder / "pairs.jsonl", rows)
    flags = f"--model_name_or_path {base} --dataset_name {data} --learning_rate 3e-2 --bf16 false --max_steps 40"
    script("sft").main([*flags.split(), "--output_dir", str(folder / "sft"), "--save_strategy", "no"])
    return folder / "sft"


def test_a_trained_model_stops_where_its_template_does(trained: Path):
    """Asked by transformers, which knows nothing of templates; and by Tandem, of a base whose config doesn't say it."""
    text: Any = AutoTokenizer.from_pretrained(trained)
    end = text.convert_tokens_to_ids("<|im_end|>")
    prompt = [{"role": "user", "content": "say mat"}]
    model = AutoModelForCausalLM.from_pretrained(trained)
    ids = text.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids) :]
    assert text.decode(answer) == "xyz<|im_end|>"
    assert set(model.generation_config.eos_token_id) == {2, end}


def test_a_base_model_is_stopped_there_too(base: Path):
    scorer = load_scorer(str(base), "float32", batch_size=1)
    assert scorer.ends == {2, scorer.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_merged_model_stops_there(base: Path, tmp_path: Path):
    adapter = tiny.save_adapter(tmp_path / "adapter", base)
    merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    saved = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert saved == [2, chat_tokenizer().convert_tokens_to_ids("<|im_end|>")]


def test_the_check_and_the_start_of_a_run_say_so(
    base: Path, trained: Path, script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = tiny.save_pairs(tmp_path / "pairs.jsonl", tiny.hh_rows(4))
    script("check_data").main(["--dataset_name", str(data), "--tokenizer_name_or_path", str(base)])
    said = r"the chat template ends answers with <\|im_end\|>, the tokenizer's end of sequence is </s>"  # in a table
    assert said in capsys.readouterr().out
    assert "answers end with  </s> or <|im_end|>" in (trained / "train.log").read_text()
