"""Turns a run's options into those of Intel Gaudi's libraries, and refuses those without a meaning there.

Imports no torch.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tandem.errors import UserError
from tandem.options.losses import LOSSES, DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import GaudiOptions, SFTOptions, TrainOptions


def check_gaudi(
    model: ModelOptions, lora: LoraOptions, train: TrainOptions, dpo: DPOOptions | None, *, lazy: bool
) -> None:
    """Refuse options that optimum-habana cannot carry out.

    Raises:
        UserError: naming all such options together.
    """
    problems = []
    if train.fp16:
        problems.append("--fp16: Gaudi computes in bfloat16 (--bf16)")
    if "8bit" in train.optim:
        problems.append(f"--optim {train.optim} needs CUDA")
    if lora.load_in_4bit:
        problems.append("--load_in_4bit needs CUDA")
    if lora.init_lora_weights not in ("true", "gaussian"):
        problems.append(f"--init_lora_weights {lora.init_lora_weights} is not there on Gaudi")
    if train.tp_size > 1:
        problems.append("--tp_size is not there on Gaudi")
    if train.balance_ranks is not None:
        problems.append("--balance_ranks is not there on Gaudi, where all batches have one shape")
    if train.eval_sets:
        problems.append("--eval_sets is not there on Gaudi: it evaluates on one")
    if train.router_aux_loss_coef is not None:
        problems.append("--router_aux_loss_coef is not there on Gaudi: the model's own counts")
    if isinstance(train, SFTOptions):
        if train.packing:
            problems.append("--packing is not there on Gaudi, where every batch has one shape")
        if train.loss_type != "nll":
            problems.append(f"--loss_type {train.loss_type} is not there on Gaudi")
    if model.attn_implementation:
        problems.append("--attn_implementation: on Gaudi it is --use_flash_attention")
    if lazy and train.gradient_checkpointing:
        problems.append("--gradient_checkpointing fails in lazy mode: set it to false, or PT_HPU_LAZY_MODE=0")
    if dpo is not None:
        if missing := [loss.name for loss, _ in dpo.losses if not loss.on_gaudi]:
            there = ", ".join(loss.name for loss in LOSSES.values() if loss.on_gaudi)
            problems.append(f"--loss_type {' '.join(missing)} is not there on Gaudi; {there} are")
        if dpo.f_divergence_type != "reverse_kl":
            problems.append(f"--f_divergence_type {dpo.f_divergence_type} is not there on Gaudi")
        if dpo.sync_ref_model:
            problems.append("--sync_ref_model is not there on Gaudi")
        if dpo.use_weighting:
            problems.append("--use_weighting is not there on Gaudi")
    if problems:
        raise UserError("; ".join(problems))


def refuse_columns(columns: Collection[str]) -> None:
    """Refuse the columns of weights, margins and rows, which the losses do not take here.

    Raises:
        UserError: naming the column.
    """
    names = {
        "weight": "the data's column 'weight'",
        "margin": "the data's column 'margin'",
        "group": "'rejected' lists",
    }
    for name, told in names.items():
        if name in columns:
            way_out = "give a row for each rejected answer" if name == "group" else f"--ignore_columns {name}"
            raise UserError(f"{told}: not there on Gaudi; {way_out}")


def row_length(text: TextOptions) -> int:
    """How long every row is.

    Raises:
        UserError: nobody has said.
    """
    if text.max_length is None:
        raise UserError("--max_length none is not there on Gaudi, where every row is as long as it says")
    return text.max_length


def training_arguments(arguments: Mapping[str, Any], *, lazy: bool, graphs: bool) -> dict[str, Any]:
    """TrainingArguments of transformers 5 → those of optimum-habana.

    Args:
        arguments: transformers 5's; without an HPU they have `use_cpu`.
        lazy: run in lazy mode.
        graphs: record the training step as an HPU graph, where lazy mode and recomputation allow it.
    """
    only_trl = ("trust_remote_code", "accelerator_config", "router_aux_loss_coef")  # `check_gaudi` refuses the last
    own = {name: value for name, value in arguments.items() if name not in only_trl}
    on_hpu = not own["use_cpu"]
    warmup = own.pop("warmup_steps")
    own |= {"warmup_ratio": warmup} if warmup < 1 else {"warmup_steps": int(warmup)}
    lazy = lazy and on_hpu
    return own | {
        "use_habana": on_hpu,
        "use_lazy_mode": lazy,
        "use_hpu_graphs_for_training": lazy and graphs and not own["gradient_checkpointing"],
        "half_precision_backend": "hpu_amp" if on_hpu else "cpu_amp",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "remove_unused_columns": False,
        "non_blocking_data_copy": on_hpu,
        "dataloader_pin_memory": False,
    }


def gaudi_config(arguments: Mapping[str, Any]) -> dict[str, bool]:
    """Settings of optimum-habana's GaudiConfig: Intel's fused kernels where they compute what was asked for."""
    return {
        "use_fused_adam": str(arguments["optim"]).startswith("adamw_torch"),
        "use_fused_clip_norm": arguments["max_grad_norm"] > 0,
        "use_dynamic_shapes": False,
    }


def model_flags(gaudi: GaudiOptions, accepted: Mapping[str, Any], *, lazy: bool, window: int | None) -> dict[str, bool]:
    """Keywords of the model's forward that the run's options ask for.

    Args:
        accepted: parameters of the model's forward.
        window: the model's sliding window, where it is shorter than the rows.

    Raises:
        UserError: the model's forward has no flash attention, or the causal mask alone would lose the window.
    """
    flags = {name: True for name in gaudi.asked()}
    if missing := [name for name in flags if name not in accepted]:
        raise UserError(f"--{missing[0]}: this model has no flash attention in optimum-habana")
    if window is not None and gaudi.flash_attention_causal_mask:
        raise UserError(f"--flash_attention_causal_mask: this model's window of {window} tokens would be lost")
    return flags | ({"lazy_mode": lazy} if "lazy_mode" in accepted else {})
