"""Options as other programs call them: each is taken, renamed, dropped with a line, or refused with what to use."""

import dataclasses

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from tandem.errors import UserError
from tandem.options.fields import options_of
from tandem.options.migration import COUNTERPARTS
from tandem.options.parsing import parse
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, check, classes

OWN = {option.name for run in (SFTOptionSet, DPOOptionSet) for cls in classes(run) for option in options_of(cls)}
THEIRS = (TrainingArguments, DPOConfig, SFTConfig, ModelConfig, ScriptArguments, LoraConfig)
LEAST = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


def dpo(*argv: str):
    """Each option of a command line of dpo.py with its value."""
    options = parse(
        [*LEAST, *argv],
        classes(DPOOptionSet),
        prog="dpo.py",
        check=check,
        foreign=COUNTERPARTS,
    )
    return {option.name: getattr(each, option.name) for each in options for option in options_of(type(each))}


@pytest.mark.parametrize("configuration", THEIRS, ids=lambda cls: cls.__name__)
def test_every_field_of_the_installed_versions_has_its_place(configuration: type):
    fields = {field.name for field in dataclasses.fields(configuration) if field.init}
    assert sorted(fields - OWN - COUNTERPARTS.keys()) == []


def test_the_table_is_about_what_tandem_has_not_and_names_what_it_has():
    assert not COUNTERPARTS.keys() & OWN
    for name, each in COUNTERPARTS.items():
        assert each.to is None or each.to in OWN, name
        assert each.to or each.told, name


@pytest.mark.parametrize("configuration", THEIRS, ids=lambda cls: cls.__name__)
def test_their_defaults_are_no_reason_to_refuse(configuration: type):
    """A recipe that spells a default out asks for nothing: save where Tandem always does otherwise."""
    otherwise = {"precompute_ref_log_probs", "use_bnb_nested_quant"}
    for field in dataclasses.fields(configuration):
        each = COUNTERPARTS.get(field.name)
        if each is None or each.to or field.name in otherwise or field.default is dataclasses.MISSING:
            continue
        value = getattr(field.default, "value", field.default)
        assert each.takes(value), (field.name, value)


@pytest.mark.parametrize(
    ("argv", "option", "value", "said"),
    [
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1, "warmup_ratio is called warmup_steps here (below 1"),
        (["--torch_dtype", "bfloat16"], "dtype", "bfloat16", "torch_dtype is called dtype here"),
        (["--evaluation_strategy", "no"], "eval_strategy", "no", "evaluation_strategy is called eval_strategy here"),
        (["--no_remove_unused_columns"], "output_dir", "o", "no_remove_unused_columns is not needed"),
        (["--precompute_ref_log_probs"], "output_dir", "o", "precompute_ref_log_probs is not needed: the reference is"),
        (["--do_eval", "true"], "output_dir", "o", "do_eval is not needed: --eval_strategy says when"),
    ],
)  # fmt: skip
def test_what_has_another_name_or_is_always_so(argv, option, value, said, capsys):
    assert dpo(*argv)[option] == value
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"note: command line: {said}")


def test_it_is_said_once_for_all_processes(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    dpo("--warmup_ratio", "0.1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--push_to_hub"], "push_to_hub is not an option here; upload the finished model"),
        (["--rpo_alpha", "1"], "rpo_alpha is not an option here; RPO is --loss_type sigmoid sft"),
        (["--overwrite_output_dir"], "--resume_from_checkpoint no starts over"),
        (["--precompute_ref_log_probs", "false"], "the reference is always scored first"),
        (["--save_only_model", "true"], "checkpoints are there to resume from"),
        (["--warmup_ratio", "0.1", "--warmup_steps", "3"], "warmup_ratio is warmup_steps here, which is given as well"),
        (["--deepspeed", "zero3.json"], "the accelerate config says how processes share the model"),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_use(argv: list[str], said: str):
    with pytest.raises(UserError) as refused:
        dpo(*argv)
    assert said in str(refused.value)


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("push_to_hub: true\nhub_model_id: me/m\nlearning_rte: 1\nlora_r: 0\nuse_peft: true\n")
    with pytest.raises(UserError) as refused:
        dpo("--config", str(recipe))
    for told in (
        "push_to_hub is not",
        "hub_model_id is not",
        "unknown option learning_rte",
        "--lora_r must be at least 1",
    ):
        assert told in str(refused.value)


HANDBOOK = """
model_name_or_path: owner/sft
torch_dtype: null
attn_implementation: sdpa
dataset_name: owner/pairs
dataset_num_proc: 12
bf16: true
beta: 0.01
do_eval: true
eval_strategy: "no"
gradient_accumulation_steps: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
learning_rate: 5.0e-6
log_level: info
logging_steps: 0.05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: data/out
per_device_train_batch_size: 4
push_to_hub: false
save_strategy: steps
save_steps: 0.5
seed: 42
warmup_ratio: 0.1
report_to:
- tensorboard
use_peft: true
lora_r: 128
lora_alpha: 128
lora_dropout: 0.0
lora_target_modules:
- q_proj
- v_proj
lora_modules_to_save: [lm_head]
"""


def test_a_recipe_in_the_shape_of_a_handbooks(tmp_path, capsys):
    """Keys as public recipes have them, the values in this project's words."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HANDBOOK.replace("torch_dtype: null", "torch_dtype: auto"))
    options = parse(
        ["--config", str(recipe)], classes(DPOOptionSet), prog="dpo.py", check=lambda *_: None, foreign=COUNTERPARTS
    )
    values = {option.name: getattr(each, option.name) for each in options for option in options_of(type(each))}
    assert values["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert (values["warmup_steps"], values["save_steps"], values["logging_steps"]) == (0.1, 0.5, 0.05)
    assert (values["dtype"], values["lora_modules_to_save"], values["dataset_num_proc"]) == ("auto", ["lm_head"], 12)
    notes = capsys.readouterr().err.splitlines()
    assert sorted(note.split(": ")[2].split(" ")[0] for note in notes) == [
        "do_eval", "gradient_checkpointing_kwargs", "log_level", "push_to_hub", "torch_dtype",
        "warmup_ratio",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "value"),
    [('{"num_cycles": 2, "name": "x"}', {"num_cycles": 2, "name": "x"}), ("{}", {}), ("none", None)],
)
def test_a_mapping_on_the_command_line_is_json(given: str, value: dict | None):
    assert dpo("--lr_scheduler_kwargs", given)["lr_scheduler_kwargs"] == value


@pytest.mark.parametrize("given", ["[1]", "num_cycles=2", "3"])
def test_what_is_no_mapping_is_refused(given: str):
    with pytest.raises(UserError, match="lr_scheduler_kwargs must be a mapping"):
        dpo("--lr_scheduler_kwargs", given)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--save_steps", "1.5"], "--save_steps must be a whole number, or below 1 a share of all steps, not 1.5"),
        (["--load_best_model_at_end"], "--load_best_model_at_end has no effect without --eval_strategy"),
        (["--save_strategy", "best"], "--save_strategy best needs --eval_strategy"),
        (
            ["--eval_strategy", "epoch", "--load_best_model_at_end"],
            "--load_best_model_at_end needs a checkpoint of every evaluation: --save_strategy best, or epoch",
        ),
        (["--metric_for_best_model", "x"], "--metric_for_best_model has no effect without --load_best_model_at_end"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "reduce_lr_on_plateau needs --eval_strategy"),
        (["--optim", "sgd", "--adam_beta1", "0.8"], "--adam_beta1 has no effect with --optim sgd"),
        (["--use_dora"], "--use_dora has no effect without --use_peft"),
        (["--wandb_project", "p"], "--wandb_project has no effect without --report_to wandb"),
    ],
)
def test_what_has_no_effect_is_refused(argv: list[str], said: str):
    with pytest.raises(UserError) as refused:
        dpo(*argv)
    assert said in str(refused.value)
