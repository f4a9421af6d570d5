"""Recipes of other programs become configs: flat ones and sectioned ones, every key with its comment."""

from pathlib import Path

import pytest
import yaml

from tandem.commands import convert
from tandem.errors import UserError
from tandem.options.convert import convert_recipe
from tandem.options.fields import options_of
from tandem.training.option_sets import DPOOptionSet, classes

DPO = {option.name: option for cls in classes(DPOOptionSet) for option in options_of(cls)}

FLAT = """
model_name_or_path: owner/sft
torch_dtype: bfloat16
dataset_name: owner/pairs
dataset_num_proc: 8
do_eval: true
gradient_checkpointing_kwargs:
  use_reentrant: false
warmup_ratio: 0.1
learning_rate: 5.0e-7
lr_scheduler_kwargs:
  min_lr_rate: 0.1
lr_scheduler_type: cosine_with_min_lr
output_dir: data/out
push_to_hub: true
hub_model_id: me/model
report_to: [tensorboard]
"""
SECTIONED = """
policy_name: owner/model
ref_name: owner/other
dataset:
  name: owner/pairs
  max_len: 512
  seed: 7
dpo_training:
  dpo_beta: 0.2
  batch_size: 4
  learning_rate: 1e-5
  epochs: 2
tail_test: hoeffding
margin_plot: true
"""
ANOTHER = """
model:
  name: owner/model
  use_gradient_checkpointing: true
  dtype: bfloat16
training:
  num_epochs: 3
  per_device_batch_size: 2
  gradient_accumulation_steps: 8
  output_dir: out
data:
  path: pairs.jsonl
lora:
  enabled: true
  r: 8
  alpha: 16
logging:
  use_wandb: true
  log_steps: 5
"""
NESTED = """
exp_name: first
logging_dir: ./logs
actor_train:
  model_args:
    model_name_or_path: owner/model
    dtype: bf16
  training_args:
    learning_rate: 1.0e-6
    per_device_train_batch_size: 1
    warmup_steps: 20
  strategy_args:
    strategy_name: deepspeed_train
    strategy_config:
      zero: 3
"""


def converted(tmp_path: Path, text: str):
    (tmp_path / "recipe.yaml").write_text(text)
    return convert_recipe(tmp_path / "recipe.yaml", DPO)


def test_a_flat_recipe(tmp_path: Path):
    result = converted(tmp_path, FLAT)
    assert result.values == {
        "model_name_or_path": "owner/sft",
        "dataset_name": "owner/pairs",
        "dataset_num_proc": 8,
        "warmup_steps": 0.1,
        "learning_rate": 5e-7,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "lr_scheduler_type": "cosine_with_min_lr",
        "output_dir": "data/out",
        "report_to": ["tensorboard"],
    }
    assert [key.split(":")[0] for key in result.open] == ["push_to_hub", "hub_model_id", "dtype"]
    lines = result.text.splitlines()
    assert "warmup_steps: 0.1  # warmup_ratio: below 1 it is a share of all steps" in lines
    assert any(line.startswith("# NOT TAKEN  push_to_hub: 'true'  (upload the finished model") for line in lines)


@pytest.mark.parametrize(
    ("text", "values", "left"),
    [
        (
            SECTIONED,
            {
                "model_name_or_path": "owner/model",
                "reference_model": "owner/other",
                "dataset_name": "owner/pairs",
                "max_length": 512,
                "seed": 7,
                "beta": 0.2,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-5,
                "num_train_epochs": 2.0,
                "tail_test": "hoeffding",
            },
            ["margin_plot"],
        ),
        (
            ANOTHER,
            {
                "model_name_or_path": "owner/model",
                "gradient_checkpointing": True,
                "dtype": "bfloat16",
                "num_train_epochs": 3.0,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "output_dir": "out",
                "dataset_name": "pairs.jsonl",
                "use_peft": True,
                "lora_r": 8,
                "lora_alpha": 16,
                "logging_steps": 5.0,
                "report_to": ["wandb"],
            },
            [],
        ),
        (
            NESTED,
            {
                "run_name": "first",
                "model_name_or_path": "owner/model",
                "learning_rate": 1e-6,
                "per_device_train_batch_size": 1,
                "warmup_steps": 20.0,
            },
            ["logging_dir", "actor_train.strategy_args", "dtype"],
        ),
    ],
    ids=["sections", "more sections", "nested"],
)
def test_recipes_in_sections(text: str, values: dict, left: list[str], tmp_path: Path):
    result = converted(tmp_path, text)
    assert result.values == values
    assert [line.split(": ")[0] for line in result.open] == left


@pytest.mark.parametrize("text", [FLAT, SECTIONED, ANOTHER, NESTED])
def test_every_key_is_in_the_file_and_the_file_is_the_config(text: str, tmp_path: Path, capsys):
    result = converted(tmp_path, text)
    convert.main([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "config.yaml")])
    written = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(written).items() <= result.values.items()
    idle = {line.split()[3].rstrip(":") for line in written.splitlines() if line.startswith("# NO EFFECT")}
    assert idle == result.values.keys() - yaml.safe_load(written).keys()
    assert idle <= {"run_name"}  # no tracker would show it
    for line in text.splitlines():
        key, _, value = line.strip().partition(":")
        if value and key not in ("use_reentrant", "min_lr_rate", "strategy_name", "zero"):
            assert key in written, key


def test_what_is_left_to_do_is_told(tmp_path: Path, capsys):
    (tmp_path / "recipe.yaml").write_text(SECTIONED + "adam_beta1: 2\n")
    convert.main([str(tmp_path / "recipe.yaml")])
    told = capsys.readouterr().err.splitlines()
    assert "note: not taken: margin_plot: nothing in Tandem stands for it" in told
    assert any(line.startswith("note: to settle: --output_dir is required") for line in told)
    assert any("--adam_beta1 must be" in line for line in told)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n", "must be a mapping"), ("a: [\n", "not YAML"), ("foo: 1\n", "none of its keys is known")],
)
def test_what_is_no_recipe(text: str, said: str, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        convert.main([str(tmp_path / "recipe.yaml")])


def test_a_secret_is_not_copied_into_a_comment(tmp_path: Path):
    result = converted(tmp_path, "hub_token: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH\nbeta: 0.1\n")
    assert "hf_abc" not in result.text


def test_the_stage_decides_what_is_an_option(tmp_path: Path, capsys):
    (tmp_path / "recipe.yaml").write_text("beta: 0.1\nlearning_rate: 1.0e-5\n")
    convert.main([str(tmp_path / "recipe.yaml"), "--stage", "sft"])
    output = capsys.readouterr()
    assert "# NOT TAKEN  beta: '0.1'" in output.out
    assert "not taken: beta: nothing in Tandem stands for it" in output.err
