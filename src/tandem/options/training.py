"""Options of training: the run itself, the engine, Gaudi, the plan, and what does not go together across classes.

Only what Tandem has reviewed is here. An option of TRL or transformers that is not is refused by name rather than
passed on: `options.migration` says what stands for it.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tandem import contract, ranks
from tandem.errors import UserError
from tandem.options.fields import REQUIRED, opt, refuse
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, PreparationOptions, is_adapter
from tandem.options.rules import Options
from tandem.options.trackers import TRACKERS

LAYOUTS = ("shared", "packed", "padded")
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau",
)  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit")


_NO_ADAM = "optim=sgd|adafactor"
_SET_BY_DEBUG = "debug, which sets it itself"


@dataclasses.dataclass
class TrainOptions(PreparationOptions):
    """Training."""

    output_dir: str = opt(REQUIRED, "folder for checkpoints, logs and the trained model", trl=True)
    num_train_epochs: float = opt(
        1.0,
        "passes over the training pairs",
        above=0,
        unless=("max_steps!=-1, which says when to stop", _SET_BY_DEBUG),
        trl=True,
    )
    max_steps: int = opt(
        -1,
        "stop after this many optimizer steps; -1: by --num_train_epochs",
        low=1,
        besides={-1: "for --num_train_epochs"},
        unless=_SET_BY_DEBUG,
        trl=True,
    )
    per_device_train_batch_size: int = opt(8, "pairs (SFT: examples) per device and micro-batch", low=1, trl=True)
    per_device_eval_batch_size: int = opt(8, "the same in evaluation", low=1, needs="eval_strategy!=no", trl=True)
    gradient_accumulation_steps: int = opt(
        1, "micro-batches per optimizer step", low=1, unless="global_batch_size!=none, which it follows from"
    )
    global_batch_size: int | None = opt(
        None, "pairs per optimizer step over all processes, instead of --gradient_accumulation_steps", low=1
    )
    learning_rate: float | None = opt(
        None, "peak learning rate; unset: 1e-6, and 1e-5 for an adapter (SFT: 2e-5 and 2e-4)", low=0, trl=True
    )
    lr_scheduler_type: str = opt("linear", "learning rate schedule", choices=SCHEDULES, trl=True)
    lr_scheduler_kwargs: dict[str, Any] | None = opt(
        None, 'the schedule\'s own settings, as {"min_lr_rate": 0.1} for cosine_with_min_lr', trl=True
    )
    warmup_steps: float = opt(
        0.0,
        "steps of warm-up; below 1: as a share of all steps",
        low=0,
        unless="lr_scheduler_type=constant, but constant_with_warmup has one",
        trl=True,
    )
    weight_decay: float = opt(0.0, "AdamW weight decay", low=0, trl=True)
    max_grad_norm: float = opt(1.0, "clip the gradient to this norm; 0: do not", low=0, trl=True)
    optim: str = opt(
        "adamw_torch",
        "optimizer; adamw_torch is fused on CUDA; those of 8 bits need the extra quantization",
        choices=OPTIMIZERS,
        trl=True,
    )
    optim_args: str | None = opt(None, "the optimizer's own settings, as name=value,name=value", trl=True)
    adam_beta1: float = opt(0.9, "AdamW: decay of the mean of gradients", low=0, below=1, unless=_NO_ADAM, trl=True)
    adam_beta2: float = opt(0.999, "AdamW: decay of the mean of squares", low=0, below=1, unless=_NO_ADAM, trl=True)
    adam_epsilon: float = opt(1e-8, "AdamW: added to the denominator", above=0, unless=_NO_ADAM, trl=True)
    seed: int = opt(42, "seed of adapters, data order and dropout", low=0, trl=True)
    bf16: bool | None = opt(None, "bfloat16 autocast; unset: where the device multiplies it fast")
    fp16: bool = opt(False, "float16 autocast", trl=True)
    gradient_checkpointing: bool | None = opt(
        None,
        "recompute activations in the backward pass: slower, much less memory; unset: on, but in Gaudi's lazy mode",
    )
    use_cpu: bool = opt(False, "train on the CPU though there is an accelerator")
    tp_size: int = opt(
        1,
        "tensor parallelism: cut each matrix over this many processes; those with the same part shard it by FSDP",
        low=1,
    )
    max_train_samples: int | None = opt(None, "use the first N training pairs", low=1, unless=_SET_BY_DEBUG)
    max_eval_samples: int | None = opt(None, "use the first N held-out pairs", low=1, needs="eval_strategy!=no")
    logging_steps: float = opt(
        10, "optimizer steps between two logs; below 1: a share of all steps", above=0, unless=_SET_BY_DEBUG, trl=True
    )
    logging_first_step: bool = opt(False, "log the first step as well", trl=True)
    eval_strategy: str = opt("no", "when to evaluate on the held-out pairs", choices=("no", "steps", "epoch"), trl=True)
    eval_sets: list[str] = opt(
        [],
        "evaluate on these instead of the data's own held-out pairs, each by itself, as NAME=DATA: a file, a folder or "
        "a Hub name; logged as eval_NAME_loss and so on",
        needs="eval_strategy!=no",
    )
    eval_steps: float | None = opt(
        None,
        "optimizer steps between evaluations, with --eval_strategy steps; below 1: a share of all steps",
        above=0,
        trl=True,
    )
    eval_delay: float = opt(
        0, "no evaluation before this many steps, or epochs", low=0, needs="eval_strategy!=no", trl=True
    )
    eval_on_start: bool = opt(False, "evaluate before the first step", needs="eval_strategy!=no", trl=True)
    save_strategy: str = opt(
        "steps",
        "when to save a checkpoint; best: when an evaluation was the best so far",
        choices=("no", "steps", "epoch", "best"),
        unless=_SET_BY_DEBUG,
        trl=True,
    )
    save_steps: float = opt(
        500,
        "optimizer steps between checkpoints, with --save_strategy steps; below 1: a share of all steps",
        above=0,
        needs="save_strategy=steps",
        unless=_SET_BY_DEBUG,
        trl=True,
    )
    save_total_limit: int | None = opt(
        3, "keep this many checkpoints; none: all", low=1, unless="save_strategy=no", trl=True
    )
    load_best_model_at_end: bool = opt(
        False, "the model saved at the end is that of the best evaluation", needs="eval_strategy!=no", trl=True
    )
    metric_for_best_model: str | None = opt(
        None, "what an evaluation is best by, as eval_rewards/accuracies; unset: its loss", trl=True
    )
    greater_is_better: bool | None = opt(
        None, "whether a greater one is; unset: yes, unless it is a loss", needs="metric_for_best_model!=none", trl=True
    )
    early_stopping_patience: int | None = opt(
        None, "stop after this many evaluations without a better one", low=1, needs="eval_strategy!=no"
    )
    resume_from_checkpoint: str = opt("auto", "auto: the last complete checkpoint; no: start over; or its folder")
    allow_changed: list[str] = opt([], "options that may differ from those of the run that is resumed")
    report_to: list[str] = opt(
        ["none"],
        "trackers; those beside wandb, tensorboard and trackio are transformers' own",
        choices=("none", *TRACKERS),
        trl=True,
    )
    wandb_project: str | None = opt(
        None, "project of the run in wandb; unset: $WANDB_PROJECT, else tandem", needs="report_to=wandb"
    )
    run_name: str | None = opt(None, "name of the run in the trackers", needs="report_to!=none", trl=True)
    mount_dir: str | None = opt(None, "mirror checkpoints, the final model and logs into this folder at every save")
    dataloader_num_workers: int | None = opt(
        None, "processes that make batches ahead of the step; unset: 2 with an accelerator, 0 on the CPU", low=0
    )
    balance_ranks: bool | None = opt(
        None,
        "with several processes: deal each optimizer step's pairs so that all have as much to do; unset: where no loss "
        "depends on which pairs share a micro-batch",
    )
    ddp_timeout: int = opt(1800, "seconds that a process waits for the others", low=1, trl=True)
    ddp_find_unused_parameters: bool | None = opt(
        None, "DDP: look for parameters that a step left out; for a model part of which pairs never reach", trl=True
    )
    tf32: bool | None = opt(None, "multiply float32 in TensorFloat-32, on GPUs that can", trl=True)
    full_determinism: bool = opt(False, "deterministic kernels alone: slower", trl=True)
    neftune_noise_alpha: float | None = opt(None, "NEFTune: size of the noise on embeddings", above=0, trl=True)
    router_aux_loss_coef: float | None = opt(
        None, "weight of the loss that spreads tokens over experts; unset: the model's own", low=0, trl=True
    )
    debug: bool = opt(False, "32 pairs, 4 steps, every step logged, anomaly detection on")

    def conflicts(self) -> Iterator[str]:
        if self.bf16 and self.fp16:
            yield "--bf16 and --fp16 exclude each other"
        if (self.eval_steps is not None) != (self.eval_strategy == "steps"):
            yield "--eval_steps and --eval_strategy steps need each other"
        yield from self._conflicts_of_sets()
        if self.save_strategy == "best" and self.eval_strategy == "no":
            yield "--save_strategy best needs --eval_strategy"
        if self.load_best_model_at_end and self.save_strategy not in ("best", self.eval_strategy):
            yield (
                f"--load_best_model_at_end needs a checkpoint of every evaluation: --save_strategy best, or "
                f"{self.eval_strategy} as --eval_strategy, not {self.save_strategy}"
            )
        if self.metric_for_best_model is not None and not self.needs_best:
            yield (
                "--metric_for_best_model has no effect without --load_best_model_at_end, --save_strategy best, "
                "--early_stopping_patience or --lr_scheduler_type reduce_lr_on_plateau"
            )
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and self.eval_strategy == "no":
            yield "--lr_scheduler_type reduce_lr_on_plateau needs --eval_strategy: it waits for evaluations"
        for name in ("logging_steps", "save_steps", "eval_steps"):
            steps = getattr(self, name)
            if steps is not None and steps > 1 and steps != int(steps):
                yield f"--{name} must be a whole number, or below 1 a share of all steps, not {steps}"
        if self.optim_args and not all(re.fullmatch(r"\s*\w+\s*=[^=]+", part) for part in self.optim_args.split(",")):
            yield f"--optim_args must be name=value,name=value, not {self.optim_args}"
        for name in self.report_to:
            if (package := TRACKERS.get(name)) and importlib.util.find_spec(package.partition(".")[0]) is None:
                yield f"--report_to {name} needs the package {package}, which is not installed"
        if "none" in self.report_to and len(self.report_to) > 1:
            yield "--report_to none excludes other trackers"
        if "8bit" in self.optim and importlib.util.find_spec("bitsandbytes") is None:
            yield f"--optim {self.optim} needs bitsandbytes: {contract.extra('quantization')}"
        for name in ("output_dir", "mount_dir"):
            folder = getattr(self, name)
            if folder and Path(folder).is_file():
                yield f"--{name} {folder}: is a file"
        if self.mount_dir and Path(self.mount_dir).resolve().is_relative_to(Path(self.output_dir).resolve()):
            yield f"--mount_dir {self.mount_dir} is inside of --output_dir, which would mirror the mirror"

    def _conflicts_of_sets(self) -> Iterator[str]:
        names = [name for name, _ in self.named_sets]
        for given, (name, source) in zip(self.eval_sets, self.named_sets, strict=True):
            if not re.fullmatch(r"\w{1,50}", name) or not source:
                yield f"--eval_sets {given}: must be NAME=DATA, NAME of at most 50 letters, digits and _"
        if len(set(names)) < len(names):
            yield f"--eval_sets {' '.join(self.eval_sets)}: a name is there twice"
        metric = str(self.metric_for_best_model or "").removeprefix("eval_")
        if names and self.needs_best and not any(metric.startswith(f"{name}_") for name in names):
            yield (
                "--metric_for_best_model must be of one of --eval_sets, as "
                f"{' or '.join(f'eval_{name}_loss' for name in names)}"
            )

    @property
    def named_sets(self) -> list[tuple[str, str]]:
        """Name and data of each set to evaluate on."""
        return [(name, source) for name, _, source in (each.partition("=") for each in self.eval_sets)]

    @property
    def needs_best(self) -> bool:
        """Whether evaluations are compared with each other."""
        plateau = self.lr_scheduler_type == "reduce_lr_on_plateau"
        stops = self.early_stopping_patience is not None
        return self.load_best_model_at_end or self.save_strategy == "best" or stops or plateau

    @property
    def usual_rates(self) -> tuple[float, float]:
        """The learning rates where none is given: of all weights, and of an adapter, whose B begins at zero."""
        return 1e-6, 1e-5

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

    loss_type: Literal["nll", "dft"] = opt(
        "nll",
        "negative log-likelihood, or weighted by the tokens' own probabilities (DFT, arXiv 2508.05629)",
        choices=("nll", "dft"),
    )
    completion_only_loss: bool | None = opt(
        None, "learn answers alone; unset: of question and answer the answer, of conversations and texts all"
    )
    assistant_only_loss: bool = opt(False, "of conversations, learn the assistant's turns alone")
    layout: Literal["packed", "padded"] = opt(
        "packed", "examples forwarded one after the other without padding (packed), or as TRL (padded)",
        choices=("packed", "padded"),
    )  # fmt: skip
    packing: bool = opt(
        False, "put examples together into rows of --max_length tokens, of which none sees another",
        needs="max_length!=none",
    )  # fmt: skip
    packing_strategy: Literal["bfd", "bfd_split"] = opt(
        "bfd",
        "best fit; what is longer than --max_length is cut (bfd), or goes on in another row (bfd_split)",
        choices=("bfd", "bfd_split"),
        needs="packing",
    )

    @property
    def usual_rates(self) -> tuple[float, float]:
        return 2e-5, 2e-4


@dataclasses.dataclass
class EngineOptions(Options):
    """Pair engine."""

    layout: Literal["shared", "packed", "padded"] = opt(
        "shared", "each prompt forwarded once (shared), twice unpadded (packed), or as TRL (padded)", choices=LAYOUTS
    )
    token_budget: int | None = opt(
        None,
        "most tokens that a process forwards at a time: --per_device_train_batch_size pairs go through in parts of as "
        "many pairs each; means over pairs stay as they are",
        low=1,
    )
    ref_cache: str | None = opt(None, "folder of reference log-probs; unset: in the user's cache folder")


@dataclasses.dataclass
class GaudiOptions(Options):
    """Intel Gaudi."""

    use_flash_attention: bool = opt(False, "Gaudi: Intel's fused attention, in models that have it")
    flash_attention_recompute: bool = opt(
        False, "Gaudi: recompute it in the backward pass: slower, less memory", needs="use_flash_attention"
    )
    flash_attention_causal_mask: bool = opt(
        False, "Gaudi: give it no mask but its own causal one: faster", needs="use_flash_attention"
    )

    def asked(self) -> list[str]:
        """Names of the options that are on."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]


@dataclasses.dataclass
class PlanOptions(Options):
    """Plan."""

    plan: bool = opt(False, "print parameters, peak memory by part, steps, tokens and time, and train nothing")
    accelerate_config: str | None = opt(
        None, "with --plan: the accelerate config to plan for; unset: this process", needs="plan"
    )
    device_memory_gib: float | None = opt(
        None, "with --plan: memory of a device in GiB; unset: this machine's", above=0, needs="plan"
    )


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
    if lora.load_in_4bit and not lora.use_peft and not is_adapter(model.model_name_or_path):
        problems.append("--load_in_4bit needs --use_peft or an adapter: 4-bit weights cannot be trained themselves")
    if model.model_revision is not None and Path(model.model_name_or_path).is_dir():
        problems.append(f"--model_revision has no effect: {model.model_name_or_path} is a folder")
    if train.tp_size > 1 and lora.init_lora_weights in ("pissa", "olora"):
        problems.append(f"--init_lora_weights {lora.init_lora_weights} needs whole weights, which --tp_size cuts")
    if train.fp16 and not _accelerator_for(train):
        problems.append("--fp16 needs an accelerator: use --bf16, or neither, on the CPU")
    if train.bf16 and not train.use_cpu:
        from tandem.devices import gpu_without_bf16  # torch takes seconds, which only --bf16 pays

        if gpu := gpu_without_bf16():
            problems.append(f"--bf16: {gpu} has no bfloat16, only a slow emulation: use --fp16, or neither for float32")
    if train.fp16 and lora.load_in_4bit:
        problems.append(
            "--fp16 with --load_in_4bit: TRL trains an adapter of 4 bits in bfloat16, whose gradients float16's scaler "
            "cannot take: leave --fp16 out"
        )
    if min(train.per_device_train_batch_size, train.tp_size) >= 1:  # else they are refused themselves
        try:
            train.accumulation(max(ranks.count() // train.tp_size, 1))
        except UserError as problem:
            problems.append(str(problem))
    refuse(problems)


def _accelerator_for(train: TrainOptions) -> bool:
    if train.use_cpu:
        return False
    import torch  # seconds, which only --fp16 pays

    return torch.accelerator.is_available()
