"""The SFT and DPO stages: options → data → trainer → a complete model folder."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, get_scheduler

from tandem import ranks
from tandem.devices import fast_bf16, has_accelerator
from tandem.errors import UserError, first_line
from tandem.log import logger
from tandem.models.ends import stop_at_turn_end
from tandem.models.fits import check_checkpointing, check_head, check_lora, check_rows, forward_told, positions_of
from tandem.models.habana import is_lazy
from tandem.models.load import load_merged, load_model, load_tokenizer
from tandem.models.reached import hold_still
from tandem.models.vocabulary import check_vocabulary
from tandem.options.fields import handed_on, shown
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, is_adapter
from tandem.options.training import TrainOptions, check_training
from tandem.training import gpu
from tandem.training.cpu_memory import prepare_for_training
from tandem.training.groups import GROUP
from tandem.training.held import held_fine
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.preparation import training_data
from tandem.training.session import open_session
from tandem.training.settings import as_begun, day_of, run_in, usual
from tandem.training.trainers import select
from tandem.training.trainers.build import Build
from tandem.training.trainers.topology import check_launch


def run_sft(run: SFTOptionSet) -> None:
    """Fine-tune on prompt + chosen, with the loss on the completion only, and leave the model in `output_dir`."""
    run = as_begun(run)
    check_training(run.model, run.lora, run.train)
    arguments = training_arguments(run.train, run.model)
    held = held_fine(run.model, run.lora, arguments)
    builders = select.builders(run.model, run.lora, run.train, run.gaudi)
    told = forward_told(run.model.model_name_or_path)
    with told, open_session(run.train, run, "examples") as session, gpu.memory_told(run):
        if session is None:
            return
        tokenizer = load_tokenizer(run.model, day=session.day)
        data = training_data(run, tokenizer)
        session.processes = builders.start_processes(arguments)
        policy = _policy(run, held, tokenizer, data.splits)
        _settle_checkpointing(run.train, arguments, policy)
        session.start(data.pairs, data.tokens)
        session.train(builders.sft_trainer(Build(run, policy, tokenizer, arguments, data.splits)))


def run_dpo(run: DPOOptionSet) -> None:
    """Optimise the policy on preference pairs and leave it (or its adapter) in `output_dir`."""
    run = as_begun(run)
    check_training(run.model, run.lora, run.train, run.dpo)
    run.monitor.check_beta(run.dpo.beta)
    arguments = training_arguments(run.train, run.model)
    held = held_fine(run.model, run.lora, arguments)
    builders = select.builders(run.model, run.lora, run.train, run.gaudi, run.dpo)
    told = forward_told(run.model.model_name_or_path)
    with told, open_session(run.train, run, "pairs") as session, gpu.memory_told(run):
        if session is None:
            return
        tokenizer = load_tokenizer(run.model, day=session.day)
        data = training_data(run, tokenizer)
        run.dpo.check_columns(data.splits["train_dataset"].column_names)
        if run.engine.token_budget is not None and any(GROUP in each.column_names for each in data.splits.values()):
            raise UserError(
                "--token_budget does not go with lists of 'rejected' answers, which stay in one micro-batch"
            )
        if run.dpo.reference_model:
            check_vocabulary(run.dpo.reference_model, run.model, tokenizer)
        session.processes = builders.start_processes(arguments)
        policy = _policy(run, held, tokenizer, data.splits)
        _settle_checkpointing(run.train, arguments, policy)
        reference = _reference(run.model, run.dpo, run.train.tp_size)
        session.start(data.pairs, data.tokens)
        logs = session.folder / "logs"
        session.train(builders.dpo_trainer(Build(run, policy, tokenizer, arguments, data.splits, logs, reference)))


def fill_reference_cache(run: DPOOptionSet, *, part: int, parts: int) -> None:
    """Score every `parts`-th pair of a DPO run, from `part` on, with its reference, into the cache that it will read.

    One process alone, beside others with other parts; nothing is trained, and `output_dir` is left as it is.
    """
    if not run.dpo.needs_reference:
        return
    run = as_begun(run)
    arguments = training_arguments(run.train, run.model)
    held = held_fine(run.model, run.lora, arguments)
    builders = select.builders(run.model, run.lora, run.train, run.gaudi, run.dpo)
    tokenizer = load_tokenizer(run.model, day=day_of(run_in(run.train.output_dir, usual(*run))))
    splits = {
        name: pairs.select(range(part, len(pairs), parts))
        for name, pairs in training_data(run, tokenizer).splits.items()
        if part < len(pairs)
    }
    if "train_dataset" not in splits:
        return
    # Building the trainer is enough: that scores the pairs that the cache lacks
    with tempfile.TemporaryDirectory() as folder:
        builders.dpo_trainer(
            Build(
                run,
                trainable(held, run.lora, tp_size=1),
                tokenizer,
                arguments | {"output_dir": folder, "report_to": ["none"]},
                splits,
                Path(folder),
                _reference(run.model, run.dpo, tp_size=1),
            )
        )


def _reference(model: ModelOptions, dpo: DPOOptions, tp_size: int) -> Any:
    if not dpo.reference_model:
        return None
    own = dataclasses.replace(model, model_name_or_path=dpo.reference_model, model_revision=None)
    if not is_adapter(dpo.reference_model):
        return load_model(own, tp_size=tp_size)
    if tp_size > 1:
        raise UserError(f"--reference_model {dpo.reference_model}: merge this adapter first (scripts/merge_lora.py)")
    reference = load_merged(own)
    reference.name_or_path = dpo.reference_model  # for the start table
    return reference


def _policy(
    run: SFTOptionSet | DPOOptionSet, held: ModelOptions, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]
) -> Any:
    """The model that is trained, in the dtype that `held` names.

    Raises:
        UserError: the model does not fit the tokens of `splits` or the adapter that is asked for.
    """
    if held != run.model:
        logger.info("--dtype auto: held in %s, not in the stored type, since all weights are trained", held.dtype)
    policy = trainable(held, run.lora, run.train.tp_size)
    stop_at_turn_end(policy, tokenizer)
    _check_fits(run, policy, tokenizer, splits)
    _check_experts(run.train, policy)
    if not hasattr(policy, "peft_config"):
        hold_still(policy)
    return policy


def _check_fits(
    run: SFTOptionSet | DPOOptionSet, policy: Any, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]
) -> None:
    limit, largest, longest = run.text.limit, 0, 0
    for rows in splits.values():
        names = [name for name in rows.column_names if name.endswith("_ids")]
        columns = dict(zip(names, rows.select_columns(names).with_format("arrow")[:].columns, strict=True))
        lengths = {name: pc.list_value_length(column) for name, column in columns.items()}
        prompts = lengths.pop("prompt_ids", 0)
        largest = max(largest, *(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns.values()))
        longest = max(longest, *(pc.max(pc.add(prompts, each)).as_py() or 0 for each in lengths.values()))
    remedy = f"give --max_length {positions_of(policy)} or less"
    check_rows(policy, tokenizer, [largest], min(longest, limit), remedy)
    check_head(policy)
    check_lora(run.lora, policy)


def trainable(model: ModelOptions, lora: LoraOptions, tp_size: int) -> Any:
    """The model of `model`, or its adapter, loaded for training on this device."""
    if not has_accelerator():
        prepare_for_training()
    loaded = load_model(model, trainable_adapter=True, quantize=lora.load_in_4bit, tp_size=tp_size)
    loaded.config.use_cache = False
    return loaded


def _settle_checkpointing(train: TrainOptions, arguments: dict[str, Any], policy: Any) -> None:
    """Keep activations if the model cannot recompute them and recomputing is only the default."""
    can = check_checkpointing(train.gradient_checkpointing, policy)
    if arguments["gradient_checkpointing"] and not can:
        logger.info("%s keeps its activations: it has no gradient checkpointing", type(policy).__name__)
        arguments["gradient_checkpointing"] = False


def _check_experts(train: TrainOptions, policy: Any) -> None:
    if train.router_aux_loss_coef and not hasattr(policy.config.get_text_config(), "output_router_logits"):
        raise UserError("--router_aux_loss_coef has no effect: the model has no experts")


def training_arguments(train: TrainOptions, model: ModelOptions) -> dict[str, Any]:
    """The TrainingArguments that SFT and DPO have in common."""
    arguments = handed_on(train)
    on_cpu = train.use_cpu or not has_accelerator()
    arguments["use_cpu"] = on_cpu
    _check_schedule(train)
    processes = ranks.count() // train.tp_size
    arguments["gradient_accumulation_steps"] = train.accumulation(max(processes, 1))
    arguments["bf16"] = (fast_bf16() and not train.fp16) if train.bf16 is None else train.bf16
    check_launch(os.environ, arguments, cpu_asked=train.use_cpu, tp_size=train.tp_size)
    checkpointing = train.gradient_checkpointing
    if arguments["metric_for_best_model"] is None and train.needs_best:
        arguments["metric_for_best_model"] = "eval_loss"
    if arguments["greater_is_better"] is None and arguments["metric_for_best_model"] is not None:
        arguments["greater_is_better"] = not arguments["metric_for_best_model"].endswith("loss")
    arguments["gradient_checkpointing"] = not is_lazy() if checkpointing is None else checkpointing
    if train.debug:
        arguments |= {"max_steps": 4, "logging_steps": 1, "save_strategy": "no"}
    return arguments | gpu.arguments(train, on_cpu) | {"trust_remote_code": model.trust_remote_code}


def _check_schedule(train: TrainOptions) -> None:
    """Refuse settings that the schedule does not know or lacks, on which a run would fail only when training begins.

    Raises:
        UserError: in the schedule's words.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    own = dict(train.lr_scheduler_kwargs or {})
    try:
        get_scheduler(train.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=own)
    except (TypeError, ValueError) as error:
        asked = f"--lr_scheduler_type {train.lr_scheduler_type} with --lr_scheduler_kwargs {shown(own)}"
        raise UserError(f"{asked}: {first_line(error)}") from error
