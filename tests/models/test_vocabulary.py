"""A reference reads the same ids as the policy, or is refused by name before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from tandem.commands import dpo
from tandem.errors import UserError
from tandem.models.load import load_model, load_tokenizer
from tandem.models.vocabulary import check_vocabulary
from tandem.options.model import ModelOptions
from tests import tiny


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "other", seed=1)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_smaller_vocabulary_ends_the_run_in_one_line(tiny_model: Path, tiny_data: Path, other: Path, tmp_path: Path):
    edit(other / "config.json", vocab_size=100)
    given = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {tmp_path}/out --max_steps 1"
    with pytest.raises(UserError, match=r"has 100 tokens, and the policy's tokenizer 262: not of one vocabulary"):
        dpo.main([*given.split(), "--reference_model", str(other)])


def test_other_tokens_under_the_same_ids(tiny_model: Path, other: Path):
    model = ModelOptions(str(tiny_model))
    tokenizer = load_tokenizer(model)
    check_vocabulary(str(other), model, tokenizer)
    edit(other / "config.json", vocab_size=300)  # padded
    check_vocabulary(str(other), model, tokenizer)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its tokenizer is another: 'a' is token .* \(2 tokens differ\)"):
        check_vocabulary(str(other), model, tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    check_vocabulary(str(other), model, tokenizer)


def test_remote_code_names_the_option(tiny_model: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_model, tmp_path / "remote")
    edit(
        folder / "config.json",
        model_type="strange",
        auto_map={"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
    )
    (folder / "strange.py").write_text("raise SystemExit('was executed')\n")
    with pytest.raises(UserError, match="code of its own, which only SFT and DPO run, with --trust_remote_code"):
        load_model(ModelOptions(str(folder)))
