"""What a row has for its chat template beside messages reaches the model that is asked, and stays with its answers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tandem.answers.backends.base import encode
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import prompt_id
from tandem.data.held_out import held_out_prompts
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
from tandem.data.texts import tokenize_pair
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.rounds.options import PairOptions, SampleOptions
from tandem.rounds.pairs import make_pairs
from tandem.rounds.prompts import held_out_prompts as prompts_of
from tandem.rounds.sample import sample
from tandem.runs import read_jsonl
from tests import tiny

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{{ mood | default('') }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REFUSES = "{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + tiny.TEMPLATE


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Tells it."}}


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"prompt": "Weather?", "chosen": "Warm.", "rejected": "Cold.", "tools": [tool(name)]} | more


ROWS = [row("near", chat_template_kwargs={"mood": "calm"}), row("far"), row("far", chosen="Mild.")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.save_pairs(folder / "train.jsonl", tiny.hh_rows(2))
    tiny.save_pairs(folder / "test.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tools", chat_template=TEMPLATE, tied=False)


def test_a_prompt_is_asked_as_it_was_trained(data: Path):
    pairs = load_pairs(DataOptions(str(data)), "test")
    prompts = held_out_prompts(pairs, None)
    assert len(prompts) == 2, "the same words with other tools are another prompt"
    text = tiny.tokenizer(TEMPLATE)
    asked = encode(prompts, text, 2048)
    assert asked == [tokenize_pair(pair, text)["prompt_ids"] for pair in pairs[:2]]
    assert text.decode(asked[0]) == json.dumps(tool("near")) + "calm<|user|>Weather?</s><|assistant|>"


def test_prompts_without_any_keep_their_ids():
    messages = [{"role": "user", "content": "Weather?"}]
    [asked] = held_out_prompts([{"prompt": "Weather?"}], None)
    assert prompt_id(asked) == prompt_id(messages) == prompt_id("Weather?")


@pytest.mark.parametrize("name", ["generate", "compare", "evaluate", "sample"])
def test_a_refusing_template_is_one_line_with_file_and_row(
    name: str, data: Path, tmp_path: Path, script: Callable[[str], ModuleType]
):
    folder = str(tiny.save_model(tmp_path / "model", chat_template=REFUSES))
    other = str(tiny.save_model(tmp_path / "other", chat_template=REFUSES, seed=1))
    arguments = {
        "generate": ["--models", f"m={folder}", "--output_dir", str(tmp_path / "out")],
        "compare": ["--base_model", folder, "--finetuned_model", other, "--output_dir", str(tmp_path / "out")],
        "evaluate": ["--reference_model", folder, "--dpo_model", other, "--output_file", str(tmp_path / "r.json")],
        "sample": ["--models", f"m={folder}", "--output_dir", str(tmp_path / "out"), "--held_out", "true"],
    }[name]
    with pytest.raises(UserError) as error:
        script(name).main([*arguments, "--dataset_name", str(data)])
    assert str(error.value).startswith(f"{data / 'test.jsonl'} row 1: the chat template refuses it: no tools here; ")
    assert "\n" not in str(error.value)


def test_answers_and_the_pairs_made_of_them_keep_the_tools(data: Path, model: Path, tmp_path: Path):
    prompts = prompts_of(DataOptions(str(data)))
    options = SampleOptions(models=[f"policy={model}"], output_dir=str(tmp_path / "round"), num_samples=2)
    file = sample(options, GenerationOptions(), SamplingOptions(max_new_tokens=8, temperature=1.0), prompts)
    records = read_jsonl(file)
    assert [record["tools"] for record in records] == [[tool("near")]] * 2 + [[tool("far")]] * 2
    scored = [
        record | {"text": f"say {at}", "score": float(at), "finish_reason": "stop"} for at, record in enumerate(records)
    ]
    scores = tiny.save_pairs(tmp_path / "scores.jsonl", scored)
    report = make_pairs(PairOptions(scores=str(scores), output_dir=str(tmp_path / "made"), keep_near_duplicates=True))
    assert report["pairs"] == 2
    pairs = load_pairs(DataOptions(str(tmp_path / "made" / "pairs.jsonl")), "train")
    assert [pair["tools"] for pair in pairs] == [[tool("near")], [tool("far")]]
    assert pairs[0]["chat_template_kwargs"] == {"mood": "calm"}
