"""What becomes of options of TRL, transformers or PEFT that Tandem does not have under their names.

A recipe or command line written for TRL works here: an option with another name is renamed, one that asks for what
Tandem does anyway is dropped, each with a note on stderr; the others are refused, with what to use instead. A test goes
through all fields of the installed versions' configurations, so that none is forgotten after an update.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from tandem import ranks
from tandem.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """What becomes of one foreign option.

    Attributes:
        to: Tandem's option, if the foreign one is only called otherwise.
        always: values, in lower case, with which the foreign option asks for what Tandem does anyway: it is dropped.
        told: the reason, or what to use instead, for the note or the refusal.
    """

    to: str | None = None
    always: tuple[str, ...] = ()
    told: str = ""

    def takes(self, value: Any) -> bool:
        """Whether this value is renamed or dropped, and not refused."""
        return self.to is not None or _text(value) in self.always


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value).strip().lower()


def _renamed(to: str, told: str = "") -> Counterpart:
    return Counterpart(to=to, told=told)


def _always(value: str, told: str) -> Counterpart:
    return Counterpart(always=tuple(value.split("|")), told=told)


def _refused(told: str) -> Counterpart:
    return Counterpart(told=told)


def _not_there(why: str) -> Counterpart:
    """A foreign option without a counterpart. It is dropped where it is off, as in most recipes, and else refused."""
    return Counterpart(always=("false", "none", "", "no", "0", "0.0"), told=why)


_UPLOAD = "upload the finished model with scripts/upload_hf.py"
_LAUNCH = "the accelerate config says how processes share the model: accelerate_configs/, docs/scaling.md"
_MEASURED = "evaluation measures loss, rewards and accuracy of pairs; scripts/evaluate.py measures more"
_LOADER = "the pair engine makes its own batches"
_ENGINE = "the pair engine computes each token of a pair once, without padding (--layout)"
_CONTINUE = "an adapter with such settings, made with PEFT, can be trained on: --model_name_or_path ADAPTER"
_FULL_RESUME = "checkpoints are there to resume from; --output_dir holds the model alone"
_STATIC = "it is set by how the run is launched"

COUNTERPARTS: dict[str, Counterpart] = {
    # Other names
    "torch_dtype": _renamed("dtype"),
    "model_dtype": _renamed("dtype"),
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _renamed("warmup_steps", "below 1 it is a share of all steps"),
    "r": _renamed("lora_r"),
    "target_modules": _renamed("lora_target_modules"),
    "modules_to_save": _renamed("lora_modules_to_save"),
    "target_parameters": _renamed("lora_target_parameters"),
    "exclude_modules": _renamed("lora_exclude_modules"),
    "layers_to_transform": _renamed("lora_layers_to_transform"),
    "layers_pattern": _renamed("lora_layers_pattern"),
    "rank_pattern": _renamed("lora_rank_pattern"),
    "alpha_pattern": _renamed("lora_alpha_pattern"),
    "dataset_mixture": _refused("list the data sets in a YAML file and name that as --dataset_name: docs/data.md"),
    "dataset_mixer": _refused("list the data sets in a YAML file and name that as --dataset_name: docs/data.md"),
    "ref_model_name_or_path": _renamed("reference_model"),
    "ref_model": _renamed("reference_model"),
    "max_completion_length": _refused("--max_length cuts the answer's end, --max_prompt_length the prompt's beginning"),
    "project": _renamed("wandb_project"),
    "revision": _renamed("model_revision"),
    "base_model_name_or_path": _renamed("model_name_or_path"),
    "rpo_alpha": _refused("RPO is --loss_type sigmoid sft --loss_weights 1 ALPHA"),
    "reference_free": _refused("--loss_type simpo or cpo has no reference"),
    "overwrite_output_dir": _refused("--resume_from_checkpoint no starts over in a folder that holds a run"),
    "group_by_length": _not_there("rows are packed, so that length costs no padding"),
    # Always so
    "precompute_ref_log_probs": _always("true", "the reference is always scored first, and kept for later runs"),
    "padding_free": Counterpart(always=("true", "false"), told=_ENGINE),
    "remove_unused_columns": Counterpart(always=("true", "false"), told="columns are read by name: docs/data.md"),
    "no_remove_unused_columns": Counterpart(always=("true",), told="columns are read by name: docs/data.md"),
    "do_train": Counterpart(always=("true", "false"), told="the stage trains"),
    "do_eval": Counterpart(always=("true", "false"), told="--eval_strategy says when to evaluate"),
    "do_predict": _not_there("scripts/generate.py answers prompts"),
    "is_encoder_decoder": _not_there("causal language models alone"),
    "gradient_checkpointing_kwargs": Counterpart(
        always=("{'use_reentrant': false}", '{"use_reentrant": false}', "{'use_reentrant': 'false'}", "none"),
        told="checkpointing is never reentrant",
    ),
    "prediction_loss_only": Counterpart(always=("true", "false", "none"), told="nothing but numbers is kept"),
    "logging_nan_inf_filter": Counterpart(
        always=("true", "false"), told="a loss that is no number stops the run by name (--alarm_nonfinite)"
    ),
    "keep_start": _always("true", "the answer's end is cut"),
    "truncation_mode": _always(
        "keep_start", "the answer's end is cut; --max_prompt_length cuts the prompt's beginning"
    ),
    "lora_task_type": _always("causal_lm|none", "causal language models alone"),
    "task_type": _always("causal_lm|none", "causal language models alone"),
    "peft_type": _always("lora|none", f"adapters that Tandem makes are LoRA; {_CONTINUE}"),
    "inference_mode": _always("false", "an adapter is trained"),
    "use_bnb_nested_quant": _always("true", "--load_in_4bit quantizes the scales as well"),
    "disable_tqdm": Counterpart(always=("true", "false", "none"), told="progress is one line, on a terminal alone"),
    "log_level": Counterpart(
        always=("info", "warning", "passive", "error", "debug", "detail"), told="train.log has every line"
    ),
    "log_level_replica": Counterpart(
        always=("info", "warning", "passive", "error", "debug", "detail"), told="rank 0 alone logs"
    ),
    "log_on_each_node": Counterpart(always=("true", "false"), told="rank 0 alone logs"),
    "logging_strategy": _always("steps", "--logging_steps N"),
    "logging_dir": _refused("logs are in logs/ of --output_dir"),
    "save_safetensors": _always("true", "weights are safetensors"),
    "include_num_input_tokens_seen": Counterpart(
        always=("true", "false", "no", "all", "non_padding"), told="num_tokens is logged"
    ),
    "include_tokens_per_second": Counterpart(always=("true", "false"), told="the rate is in train.log"),
    "skip_memory_metrics": Counterpart(always=("true", "false"), told="each rank's memory is logged"),
    "dataloader_drop_last": _always("false", "the last batch counts; each pair has its weight"),
    "restore_callback_states_from_checkpoint": Counterpart(
        always=("true", "false"), told="a resumed run goes on bit for bit"
    ),
    "ignore_data_skip": _always("false", "a resumed run goes on with the pair it stopped at"),
    "save_on_each_node": _not_there("one folder is written, by rank 0: it must be seen by all"),
    "use_cache": _always("false", "training needs no key-value cache"),
    "dataset_text_field": _renamed("text_key"),
    "average_tokens_across_devices": _always("true", "a mean is over the tokens or pairs of all processes"),
    "dataloader_pin_memory": _always("true", _LOADER),
    "preprocessing_num_workers": _renamed("dataset_num_proc"),
    # Refused, with what to use
    "torch_empty_cache_steps": _not_there("torch's cache of memory is left alone"),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        _not_there("trackio writes to this machine; its own command uploads"),
    ),
    "chat_template_path": _not_there("--chat_template FILE takes a Jinja file"),
    "save_only_model": _not_there(_FULL_RESUME),
    "push_to_hub": _not_there(_UPLOAD),
    "push_to_hub_model_id": _not_there(_UPLOAD),
    "hub_model_id": _not_there(f"{_UPLOAD} --repo_id NAME"),
    "hub_model_revision": _not_there(_UPLOAD),
    "hub_strategy": Counterpart(always=("every_save", "end", "none"), told=_UPLOAD),
    "hub_token": _not_there("put it into the environment: HF_TOKEN"),
    "hub_private_repo": _not_there(f"{_UPLOAD} --private"),
    "hub_always_push": _not_there(_UPLOAD),
    "hub_revision": _not_there(_UPLOAD),
    "deepspeed": _not_there(_LAUNCH),
    "fsdp": _not_there(_LAUNCH),
    "fsdp_config": _not_there(_LAUNCH),
    "accelerator_config": _not_there(_LAUNCH),
    "parallelism_config": _not_there(_LAUNCH),
    "local_rank": Counterpart(always=("-1",), told=_STATIC),
    "ddp_backend": _not_there(_LAUNCH),
    "ddp_bucket_cap_mb": _not_there(_LAUNCH),
    "ddp_broadcast_buffers": _not_there(_LAUNCH),
    "ddp_static_graph": _not_there("packed rows differ from batch to batch"),
    "device_map": _not_there(_LAUNCH),
    "auto_find_batch_size": _not_there("--plan says beforehand what fits"),
    "dataset_streaming": _not_there("data sets are read whole, so that each pair is checked before training"),
    "dataset_kwargs": _not_there("columns are read by name: docs/data.md"),
    "pad_token": _not_there("packed rows need no padding; where the tokenizer has none, its end token stands in"),
    "eos_token": _not_there("the chat template and the tokenizer say how an answer ends"),
    "model_init_kwargs": _not_there("the model's options are options of their own: --dtype, --attn_implementation"),
    "pad_to_multiple_of": Counterpart(always=("auto", "none"), told=_ENGINE),
    "shuffle_dataset": _not_there("pairs are shuffled by --seed in training"),
    "eval_packing": _always("false|none", "held-out examples are forwarded without padding, and each counts by itself"),
    "precompute_ref_batch_size": _not_there("the reference is scored with the training's batch"),
    "use_liger_kernel": _not_there("the head is computed in chunks that never hold all logits"),
    "liger_kernel_config": _not_there("the head is computed in chunks that never hold all logits"),
    "optim_target_modules": _not_there("--optim lists what there is"),
    "label_smoothing_factor": _not_there("of pairs it is --label_smoothing"),
    "label_names": _not_there(_LOADER),
    "train_sampling_strategy": Counterpart(always=("random",), told="pairs are shuffled by --seed; rows are packed"),
    "length_column_name": Counterpart(always=("length",), told=_LOADER),
    "dataloader_persistent_workers": _not_there(_LOADER),
    "dataloader_prefetch_factor": _not_there(_LOADER),
    "dataloader_multiprocessing_context": _not_there(_LOADER),
    "dataloader_in_order": Counterpart(always=("true", "false"), told=_LOADER),
    "eval_accumulation_steps": _not_there(_MEASURED),
    "eval_do_concat_batches": Counterpart(always=("true", "false"), told=_MEASURED),
    "eval_use_gather_object": _not_there(_MEASURED),
    "batch_eval_metrics": _not_there(_MEASURED),
    "include_for_metrics": Counterpart(always=("", "none", "[]"), told=_MEASURED),
    "bf16_full_eval": _not_there("evaluation in training is in the training's precision; see --bf16"),
    "fp16_full_eval": _not_there("evaluation in training is in the training's precision; see --fp16"),
    "torch_compile_backend": _not_there("the model is not compiled"),
    "torch_compile_mode": _not_there("the model is not compiled"),
    "activation_checkpointing": _renamed("gradient_checkpointing"),
    "activation_checkpointing_kwargs": _not_there("checkpointing is never reentrant"),
    "enable_jit_checkpoint": _always("false", "SIGTERM always has a checkpoint written: docs/resume.md"),
    "ignore_bias_buffers": _not_there("no buffer is synchronised"),
    "loftq_config": _not_there(_CONTINUE),
    "eva_config": _not_there(_CONTINUE),
    "corda_config": _not_there(_CONTINUE),
    "lora_ga_config": _not_there(_CONTINUE),
    "velora_config": _not_there(_CONTINUE),
    "monteclora_config": _not_there(_CONTINUE),
    "kasa_config": _not_there(_CONTINUE),
    "arrow_config": _not_there(_CONTINUE),
    "megatron_config": _not_there(_CONTINUE),
    "megatron_core": Counterpart(always=("megatron.core", "none"), told=_CONTINUE),
    "runtime_config": _not_there(_CONTINUE),
    "layer_replication": _not_there(_CONTINUE),
    "use_qalora": _not_there(_CONTINUE),
    "qalora_group_size": Counterpart(always=("16",), told=_CONTINUE),
    "use_bdlora": _not_there(_CONTINUE),
    "alora_invocation_tokens": _not_there(_CONTINUE),
    "ensure_weight_tying": _not_there(_CONTINUE),
    "trainable_token_indices": _not_there(_CONTINUE),
    "fan_in_fan_out": _not_there("it is found by the layer's class"),
    "auto_mapping": _not_there(_CONTINUE),
    "peft_version": Counterpart(always=("none",), told="it is the installed one's"),
    "bias": Counterpart(always=("none",), told=_CONTINUE),
    "torch_compile": _not_there("packed rows differ from batch to batch, and each would be compiled anew"),
    "activation_offloading": _not_there("--gradient_checkpointing is what saves activations"),
    "load_in_8bit": _not_there("--load_in_4bit"),
    "bnb_4bit_quant_type": _always("nf4", "--load_in_4bit is NF4"),
    "bnb_4bit_quant_storage": Counterpart(
        always=("uint8", "none"),
        told="weights in 4 bits are stored as uint8, which FSDP leaves whole on each process; stored as floating-point "
        "numbers, FSDP 2 would shard them, and could change bits of those that are not numbers",
    ),
}


def translated(
    name: str,
    value: Any,
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    foreign: Mapping[str, Counterpart],
    source: str,
) -> tuple[str, Any]:
    """An option's name here, and its value; an empty name for one that is dropped. Notes on stderr say what was done.

    Args:
        given: all options of the same source.
        known: the program's own options.
        foreign: the other programs' options.
        source: where the option is from, for messages.

    Raises:
        UserError: a foreign option that is refused, or one that is given under both names.
    """
    counterpart = foreign.get(name)
    if name in known or counterpart is None:
        return name, value
    if isinstance(value, list) and len(value) < 2:  # from the command line: a flag without a value, or with one
        value = value[0] if value else "true"
    if not counterpart.takes(value):
        raise UserError(f"{source}: {name} is not an option here; {counterpart.told}")
    if counterpart.to is None:
        _say(f"{source}: {name} is not needed: {counterpart.told}")
        return "", value
    if counterpart.to in given:
        raise UserError(f"{source}: {name} is {counterpart.to} here, which is given as well")
    reason = f" ({counterpart.told})" if counterpart.told else ""
    _say(f"{source}: {name} is called {counterpart.to} here{reason}")
    return counterpart.to, value


def _say(line: str) -> None:
    """Print a note on stderr, from one process of a launch."""
    if ranks.is_first():
        print(f"note: {one_line(line)}", file=sys.stderr)
