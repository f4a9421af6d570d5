"""Options of training: the run itself, the engine, Gaudi, the plan, and what does not go together across classes.

Only what Tandem has reviewed is here. An option of TRL or transformers that is not is refused by name rather than
passed on: `explain_unknown` says so.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tandem.errors import UserError
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, is_adapter
from tandem.options.parsing import REQUIRED, changed, flags, opt, refuse
from tandem.options.trl_names import TRL_OPTIONS

LAYOUTS = ("shared", "packed", "padded")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit")


_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps",
    "eval_steps", "save_steps", "save_total_limit", "max_train_samples", "max_eval_samples", "tp_size",
    "global_batch_size",
)  # fmt: skip


@dataclasses.dataclass
class TrainOptions:
    """Training."""

    output_dir: str = opt(REQUIRED, "folder for checkpoints, logs and the trained model")
    num_train_epochs: float = opt(1.0, "passes over the training pairs")
    max_steps: int = opt(-1, "stop after this many optimizer steps; -1: by --num_train_epochs")
    per_device_train_batch_size: int = opt(8, "pairs (SFT: examples) per device and micro-batch")
    per_device_eval_batch_size: int = opt(8, "the same in evaluation")
    gradient_accumulation_steps: int = opt(1, "micro-batches per optimizer step")
    global_batch_size: int | None = opt(
        None, "pairs per optimizer step over all processes, instead of --gradient_accumulation_steps"
    )
    learning_rate: float = opt(1e-6, "peak learning rate")
    lr_scheduler_type: str = opt("linear", "learning rate schedule", choices=SCHEDULES)
    warmup_steps: float = opt(0.0, "steps of warm-up; below 1: as a share of all steps")
    weight_decay: float = opt(0.0, "AdamW weight decay")
    max_grad_norm: float = opt(1.0, "clip the gradient to this norm; 0: do not")
    optim: str = opt("adamw_torch", "optimizer; those of 8 bits need the extra quantization", choices=OPTIMIZERS)
    seed: int = opt(42, "seed of adapters, data order and dropout")
    bf16: bool | None = opt(None, "bfloat16 autocast; unset: where the device multiplies it fast")
    fp16: bool = opt(False, "float16 autocast")
    gradient_checkpointing: bool | None = opt(
        None,
        "recompute activations in the backward pass: slower, much less memory; unset: on, but in Gaudi's lazy mode",
    )
    use_cpu: bool = opt(False, "train on the CPU though there is an accelerator")
    tp_size: int = opt(
        1, "tensor parallelism: cut each matrix over this many processes; those with the same part shard it by FSDP"
    )
    max_train_samples: int | None = opt(None, "use the first N training pairs")
    max_eval_samples: int | None = opt(None, "use the first N held-out pairs")
    logging_steps: int = opt(10, "optimizer steps between two logs")
    eval_strategy: str = opt("no", "when to evaluate on the held-out pairs", choices=("no", "steps", "epoch"))
    eval_steps: int | None = opt(None, "optimizer steps between evaluations, with --eval_strategy steps")
    save_strategy: str = opt("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: int = opt(500, "optimizer steps between checkpoints, with --save_strategy steps")
    save_total_limit: int | None = opt(3, "keep this many checkpoints; none: all")
    resume_from_checkpoint: str = opt("auto", "auto: the last complete checkpoint; no: start over; or its folder")
    allow_changed: list[str] = opt([], "options that may differ from those of the run that is resumed")
    report_to: list[str] = opt(["none"], "trackers", choices=("none", "wandb", "tensorboard", "trackio"))
    run_name: str | None = opt(None, "name of the run in the trackers")
    mount_dir: str | None = opt(None, "mirror checkpoints, the final model and logs into this folder at every save")
    debug: bool = opt(False, "32 pairs, 4 steps, every step logged, anomaly detection on")

    def __post_init__(self) -> None:
        problems = self._without_effect()
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name} must be at least 1, not {value}")
        if self.max_steps < 1 and self.max_steps != -1:
            problems.append(f"--max_steps must be at least 1, or -1 for --num_train_epochs, not {self.max_steps}")
        if self.num_train_epochs <= 0:
            problems.append(f"--num_train_epochs must be above 0, not {self.num_train_epochs}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            if getattr(self, name) < 0:
                problems.append(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.bf16 and self.fp16:
            problems.append("--bf16 and --fp16 exclude each other")
        if (self.eval_steps is not None) != (self.eval_strategy == "steps"):
            problems.append("--eval_steps and --eval_strategy steps need each other")
        if "none" in self.report_to and len(self.report_to) > 1:
            problems.append("--report_to none excludes other trackers")
        if "8bit" in self.optim and importlib.util.find_spec("bitsandbytes") is None:
            problems.append(f"--optim {self.optim} needs bitsandbytes: pip install 'tandem[quantization]'")
        for name in ("output_dir", "mount_dir"):
            folder = getattr(self, name)
            if folder and Path(folder).is_file():
                problems.append(f"--{name} {folder}: is a file")
        if self.mount_dir and Path(self.mount_dir).resolve().is_relative_to(Path(self.output_dir).resolve()):
            problems.append(f"--mount_dir {self.mount_dir} is inside of --output_dir, which would mirror the mirror")
        refuse(problems)

    def _without_effect(self) -> list[str]:
        given = changed(self)

        def inert(names: Sequence[str], reason: str) -> list[str]:
            found = [name for name in names if name in given]
            return [f"{flags(found)} no effect {reason}"] if found else []

        problems = []
        if self.eval_strategy == "no":
            problems += inert(("max_eval_samples", "per_device_eval_batch_size"), "without --eval_strategy")
        if self.save_strategy != "steps":
            problems += inert(("save_steps",), "without --save_strategy steps")
        if self.save_strategy == "no":
            problems += inert(("save_total_limit",), "with --save_strategy no")
        if self.max_steps != -1:
            problems += inert(("num_train_epochs",), "with --max_steps, which says when to stop")
        if self.lr_scheduler_type == "constant":
            problems += inert(("warmup_steps",), "with --lr_scheduler_type constant; constant_with_warmup has one")
        if self.report_to == ["none"]:
            problems += inert(("run_name",), "without --report_to")
        if self.debug:
            fixed = (
                "max_steps", "num_train_epochs", "max_train_samples", "logging_steps", "save_strategy", "save_steps",
            )  # fmt: skip
            problems += inert(fixed, "with --debug, which sets it itself")
        if self.global_batch_size is not None:
            problems += inert(("gradient_accumulation_steps",), "with --global_batch_size, which it follows from")
        return problems

    def accumulation(self, processes: int) -> int:
        """Micro-batches per optimizer step on each of so many data-parallel processes.

        Raises:
            UserError: `global_batch_size` is not a multiple of what they forward at a time.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        at_a_time = self.per_device_train_batch_size * processes
        if self.global_batch_size % at_a_time:
            raise UserError(
                f"--global_batch_size {self.global_batch_size} is not a multiple of {at_a_time}: "
                f"--per_device_train_batch_size {self.per_device_train_batch_size} on {processes} processes"
            )
        return self.global_batch_size // at_a_time


@dataclasses.dataclass
class SFTOptions(TrainOptions):
    """Training."""

    learning_rate: float = opt(2e-5, "peak learning rate")


@dataclasses.dataclass
class EngineOptions:
    """Pair engine."""

    layout: Literal["shared", "packed", "padded"] = opt(
        "shared", "each prompt forwarded once (shared), twice unpadded (packed), or as TRL (padded)", choices=LAYOUTS
    )
    ref_cache: str | None = opt(None, "folder of reference log-probs; unset: in the user's cache folder")


@dataclasses.dataclass
class GaudiOptions:
    """Intel Gaudi."""

    use_flash_attention: bool = opt(False, "Gaudi: Intel's fused attention, in models that have it")
    flash_attention_recompute: bool = opt(False, "Gaudi: recompute it in the backward pass: slower, less memory")
    flash_attention_causal_mask: bool = opt(False, "Gaudi: give it no mask but its own causal one: faster")

    def __post_init__(self) -> None:
        if not self.use_flash_attention and (asked := self.asked()):
            raise UserError(f"--{asked[0]} has no effect without --use_flash_attention")

    def asked(self) -> list[str]:
        """Names of the options that are on."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]


@dataclasses.dataclass
class PlanOptions:
    """Plan."""

    plan: bool = opt(False, "print parameters, peak memory by part, steps, tokens and time, and train nothing")
    accelerate_config: str | None = opt(None, "with --plan: the accelerate config to plan for; unset: this process")
    device_memory_gib: float | None = opt(None, "with --plan: memory of a device in GiB; unset: this machine's")

    def __post_init__(self) -> None:
        problems = []
        without_effect = [name for name in changed(self) if name != "plan"]
        if without_effect and not self.plan:
            problems.append(f"{flags(without_effect)} no effect without --plan")
        if self.device_memory_gib is not None and self.device_memory_gib <= 0:
            problems.append(f"--device_memory_gib must be above 0, not {self.device_memory_gib}")
        refuse(problems)


def explain_unknown(name: str) -> str | None:
    """Why an option is unknown, if TRL or transformers has it."""
    if name in TRL_OPTIONS:
        return "TRL has it, but Tandem has not reviewed it and does not pass it on"
    return None


def check_training(model: ModelOptions, lora: LoraOptions, train: TrainOptions, dpo: DPOOptions | None = None) -> None:
    """Refuse combinations across classes in which an option would have no effect.

    Raises:
        UserError: naming all of them together.
    """
    problems = []
    if lora.use_peft and is_adapter(model.model_name_or_path):
        problems.append(
            f"--use_peft would add an adapter to the adapter {model.model_name_or_path}: "
            "leave it out to go on training that one, or merge it first"
        )
    if dpo is not None and lora.lora_dropout and dpo.disable_dropout:
        problems.append("--lora_dropout has no effect without --disable_dropout false")
    if model.model_revision is not None and Path(model.model_name_or_path).is_dir():
        problems.append(f"--model_revision has no effect: {model.model_name_or_path} is a folder")
    if train.fp16 and not _accelerator_for(train):
        problems.append("--fp16 needs an accelerator: use --bf16, or neither, on the CPU")
    if min(train.per_device_train_batch_size, train.tp_size) >= 1:  # else they are refused themselves
        try:
            train.accumulation(max(int(os.environ.get("WORLD_SIZE", "1")) // train.tp_size, 1))
        except UserError as problem:
            problems.append(str(problem))
    refuse(problems)


def _accelerator_for(train: TrainOptions) -> bool:
    if train.use_cpu:
        return False
    import torch  # seconds, which only --fp16 pays

    return torch.accelerator.is_available()
