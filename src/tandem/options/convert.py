"""Converts a recipe of another program to a config file of Tandem, with a comment for each key.

Recipes may be flat, as TRL's and the alignment-handbook's, or have sections (`lora:`, with `r: 16` below it). A key of
a section is known by its own name, or where that says too little, by the section's and its own (`lora.r`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tandem.errors import UserError, one_line
from tandem.options.fields import REQUIRED, Option, opt
from tandem.options.migration import COUNTERPARTS
from tandem.options.model import HALF_PRECISION, is_adapter
from tandem.options.parsing import convert
from tandem.options.rules import Options
from tandem.options.yaml_text import read_yaml

# Other programs' names of Tandem's options (`migration` has TRL's): the last part of a dotted key, or the last two
_ALIASES = {
    "policy_name": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "pretrain": "model_name_or_path",
    "model.name": "model_name_or_path",
    "model.path": "model_name_or_path",
    "ref_name": "reference_model",
    "ref_model_name": "reference_model",
    "tokenizer_name": "tokenizer_name_or_path",
    "dataset.name": "dataset_name",
    "dataset.path": "dataset_name",
    "data.path": "dataset_name",
    "data.name": "dataset_name",
    "train_data": "dataset_name",
    "train_file": "dataset_name",
    "train_path": "dataset_name",
    "train_split": "dataset_train_split",
    "test_split": "dataset_test_split",
    "eval_split": "dataset_test_split",
    "val_split": "val_ratio",
    "max_len": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_length": "max_length",
    "seq_length": "max_length",
    "seq_len": "max_length",
    "max_prompt_len": "max_prompt_length",
    "prompt_length": "max_prompt_length",
    "dpo_beta": "beta",
    "pref_beta": "beta",
    "dpo_loss_type": "loss_type",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_device_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "max_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "log_steps": "logging_steps",
    "log_every": "logging_steps",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "save_dir": "output_dir",
    "output": "output_dir",
    "exp_name": "run_name",
    "experiment_name": "run_name",
    "use_lora": "use_peft",
    "lora.enabled": "use_peft",
    "lora.r": "lora_r",
    "lora.rank": "lora_r",
    "lora_rank": "lora_r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules",
    "wandb.project": "wandb_project",
    "tail.delta": "tail_delta",
    "tail.test": "tail_test",
}
_SWITCHES = {"use_wandb": "wandb", "use_tensorboard": "tensorboard", "wandb.enabled": "wandb"}  # → item of --report_to
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names of types
_ELSEWHERE = {
    "strategy_args": "the accelerate config says how processes share the model: accelerate_configs/",
    "strategy_name": "the accelerate config says how processes share the model: accelerate_configs/",
    "device_mapping": "the accelerate config says which processes there are: accelerate_configs/",
    "num_gpus": "the accelerate config says which processes there are, or NUM_PROCESSES",
    "judge_model": "an option of scripts/judge.py",
    "max_new_tokens": "an option of scripts/compare.py and generate.py",
    "temperature": "an option of scripts/compare.py and generate.py",
    "top_p": "an option of scripts/compare.py and generate.py",
}


@dataclasses.dataclass
class ConvertOptions(Options):
    """Convert."""

    recipe: str = opt(REQUIRED, "YAML recipe of another program")
    stage: str = opt("dpo", "the stage that the config is for", choices=("sft", "dpo"))
    output: str | None = opt(None, "file to write; unset: the screen")

    def conflicts(self) -> Iterator[str]:
        if self.output is not None and Path(self.output).exists():
            yield f"--output {self.output}: is there already"


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted recipe.

    Attributes:
        text: the YAML of the config file.
        values: the options in it.
        open: keys that have no counterpart, or whose value does not fit, each with the reason.
    """

    text: str
    values: dict[str, Any]
    open: list[str]


def convert_recipe(recipe: str | Path, known: Mapping[str, Option]) -> Converted:
    """Convert a recipe, with a comment on what became of each of its keys.

    Args:
        known: the options of the stage that the config is for, by name.

    Raises:
        UserError: the file is no YAML mapping.
    """
    lines, left, values = [f"# From {Path(recipe).name}"], [], {}
    trackers: list[str] = []
    for key, value in _flat(read_yaml(str(recipe), "the recipe"), known):
        if tracker := _of(_SWITCHES, key):
            trackers += [tracker] if _is_true(value) else []
            lines.append(f"# {key}: {_shown(value)}  (--report_to)")
            continue
        name, reason = _counterpart(key, value, known)
        if name is not None:
            try:
                taken = convert(known[name], _SHORT.get(str(value), value) if name == "dtype" else value, key)
            except UserError as problem:
                name, reason = None, str(problem)
            else:
                if name in values:
                    name, reason = None, f"{name} was given before"
        if name is not None:
            values[name] = taken
            called = "" if key == name else f"  # {key}" + (f": {reason}" if reason else "")
            lines.append(_line(name, taken) + called)
        elif reason.startswith(_NOT_NEEDED):
            lines.append(f"# {key}: {_shown(value)}  {reason}")
        else:
            left.append(f"{key}: {reason}")
            lines.append(f"# NOT TAKEN  {key}: {_shown(value)}  ({reason})")
    if trackers and "report_to" not in values:
        values["report_to"] = trackers
        lines.append(_line("report_to", trackers))
    return _held_in_float32(Converted("\n".join(lines) + "\n", values, left))


_NOT_NEEDED = "(not needed: "
_NO_EFFECT = re.compile(r"--(\w+) has no effect\b")


def without_idle(converted: Converted, faults: Callable[[dict[str, Any]], list[str]]) -> Converted:
    """The recipe without options that have no effect beside its others: a run would refuse them.

    Args:
        faults: says what a run would refuse of the options it is given.
    """
    text, values = converted.text.splitlines(), dict(converted.values)
    while idle := next(
        ((found[1], told) for told in faults(values) if (found := _NO_EFFECT.match(told)) and found[1] in values), None
    ):
        name, told = idle
        del values[name]
        text = [f"# NO EFFECT  {line}  ({told})" if line.startswith(f"{name}: ") else line for line in text]
    return Converted("\n".join(text) + "\n", values, converted.open)


def _held_in_float32(converted: Converted) -> Converted:
    """The recipe without a `dtype` of half precision where all weights are trained: a run would refuse it, since their
    updates would be lost in rounding."""
    values = dict(converted.values)
    trains_adapter = values.get("use_peft") or is_adapter(str(values.get("model_name_or_path")))
    if values.get("dtype") not in HALF_PRECISION or trains_adapter:
        return converted
    dtype = values.pop("dtype")
    told = "all weights are trained, and held in float32; bf16 computes in bfloat16"
    lines = converted.text.splitlines()
    lines = [f"# NOT TAKEN  {line}  ({told})" if line.startswith("dtype: ") else line for line in lines]
    return Converted("\n".join(lines) + "\n", values, [*converted.open, f"dtype: {dtype}: {told}"])


def _counterpart(key: str, value: Any, known: Mapping[str, Option]) -> tuple[str | None, str]:
    """The option that a key stands for, or None, and what there is to say about it."""
    last = key.rpartition(".")[2]
    alias = _of(_ALIASES, key)
    name = alias if alias and "." in key and key.endswith(f".{last}") and last not in known else None
    name = name or (last if last in known else alias)
    if name in known:
        return name, ""
    if counterpart := COUNTERPARTS.get(last):
        if counterpart.to in known and counterpart.takes(value):
            return counterpart.to, counterpart.told
        if counterpart.to is None and counterpart.takes(value):
            return None, f"{_NOT_NEEDED}{counterpart.told})"
        return None, counterpart.told or f"{counterpart.to} is not an option of this stage"
    if told := _of(_ELSEWHERE, key):
        return None, told
    if name is not None:
        return None, f"{name} is not an option of this stage"
    return None, "nothing in Tandem stands for it"


def _of(table: Mapping[str, str], key: str) -> str | None:
    """The entry in `table` for the last two parts of a key, else for the last one."""
    parts = key.split(".")
    return table.get(".".join(parts[-2:])) or table.get(parts[-1])


def _flat(values: Mapping[str, Any], known: Mapping[str, Option], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, dotted behind its sections, with its value; a mapping that is an option's value is not opened."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        opened = isinstance(value, dict) and not any(name in table for table in (known, COUNTERPARTS, _ELSEWHERE))
        if opened:
            yield from _flat(value, known, f"{key}.")
        else:
            yield key, value


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "yes", "on", "1")


def _line(name: str, value: Any) -> str:
    return f"{name}: {_flow(value)}"


def _shown(value: Any) -> str:
    """A value in a comment, on one line and without secrets."""
    return one_line(_flow(value))


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("...\n").strip()
