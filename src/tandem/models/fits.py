"""Checks that model, tokenizer, data and adapter fit each other, so that a run does not first fail on the device."""

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tandem.errors import UserError, first_line
from tandem.options.model import LoraOptions

# PEFT's functions that make an adapter; a forward through an adapter calls others
_MAKING = ("get_peft_model", "inject_adapter")
_OF_MODELS = (
    "/transformers/models/",
    "/transformers_modules/",
    "/transformers/integrations/",
    "/transformers/cache_utils",
)
_OF_ADAPTERS = "/peft/tuners/"
_OF_PEFT = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, AssertionError)
_OF_FORWARD = (*_OF_PEFT, IndexError)
_UNREACHED = "Expected to have finished reduction in the prior iteration"


def check_rows(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], longest: int, remedy: str) -> None:
    """Refuse rows that `model` has no embedding or no position for.

    Args:
        ids: the token ids in the rows.
        longest: tokens of the longest row.
        remedy: what to do about rows that are too long.

    Raises:
        UserError: naming the token, or the number of positions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max([*ids, tokenizer.pad_token_id or 0])
    if 0 < rows <= largest:  # sharded by DeepSpeed it has none
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{_name(model)}: its embedding has {rows} rows, and the tokenizer's {token!r} is token {largest}: take "
            "the model's own tokenizer, or resize the embedding to this one (model.resize_token_embeddings)"
        )
    positions = positions_of(model)
    if positions is not None and longest > positions:
        raise UserError(f"{_name(model)}: a row has {longest} tokens, the model {positions} positions: {remedy}")


def positions_of(model: Any) -> int | None:
    """The number of positions in a model's position table, as in GPT-2 and GPT-J; None for a model that computes
    positions, and so accepts any length."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    words = model.get_input_embeddings()
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not words]
    learned = any(limit <= table.num_embeddings <= limit + 4 for table in tables)  # OPT's has two rows more
    fixed = any(name.endswith("embed_positions") and buffer.shape[0] == limit for name, buffer in model.named_buffers())
    return limit if learned or fixed else None


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def check_head(model: Any) -> None:
    """Refuse an adapter on the head: training reads the head's weights and never calls its forward.

    Raises:
        UserError: the adapter changes the head.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.utils import ModulesToSaveWrapper

    head = model.get_base_model().get_output_embeddings()
    if head is None or isinstance(head, ModulesToSaveWrapper) or not type(head).__module__.startswith("peft."):
        return
    adapter = model.peft_config[model.active_adapter]
    name = getattr(adapter, "base_model_name_or_path", None)
    raise UserError(
        f"the adapter on {name} changes the head ({type(head).__name__}), whose weights are read as they are, so that "
        "its change would not count: merge it first (scripts/merge_lora.py)"
    )


def check_lora(options: LoraOptions, model: Any) -> None:
    """Refuse an adapter's options that name modules which `model` lacks: PEFT would ignore these silently.

    Raises:
        UserError: naming all of them.
    """
    if not options.use_peft:
        return
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    named: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "lora_modules_to_save": (options.lora_modules_to_save, modules),
        "lora_target_parameters": (options.lora_target_parameters, parameters),
    }
    missing = [
        f"--{option} {each}"
        for option, (given, there) in named.items()
        for each in given
        if not any(name == each or name.endswith(f".{each}") for name in there)
    ]
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    missing += [
        f"--lora_layers_to_transform {each}"
        for each in options.lora_layers_to_transform
        if layers is not None and each >= layers
    ]
    if missing:
        raise UserError(f"{', '.join(missing)}: {_name(model)} has no such part")


@contextlib.contextmanager
def adapter_told() -> Iterator[None]:
    """Within the block, an adapter's refusal by PEFT or TRL becomes one line.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        by_peft = isinstance(error, _OF_PEFT) or type(error).__module__ == "re"
        by_peft &= any("/peft/" in frame.filename and frame.name in _MAKING for frame in frames)
        if not by_peft and "Applying a PEFT adapter to" not in str(error):
            raise
        raise UserError(
            f"the adapter cannot be made as --lora_… ask: {first_line(error)}; see --lora_target_modules, of which one "
            "value alone is a regex for whole names, as '.*q_proj'"
        ) from error


@contextlib.contextmanager
def forward_told(name: str) -> Iterator[None]:
    """Turn errors in transformers' code of a model or in PEFT's code of its adapter into one line: the model cannot be
    trained with these libraries. Also DDP's error over weights that got no gradient.

    Raises:
        UserError: in its place.
    """
    try:
        yield
    except _OF_FORWARD as error:
        if _UNREACHED in str(error):
            raise UserError(
                f"{name}: a micro-batch left some of what is trained without a gradient, over which DDP stops: "
                "--ddp_find_unused_parameters true"
            ) from error
        frames = [
            (frame, line)
            for frame, line in traceback.walk_tb(error.__traceback__)
            if "/torch/" not in frame.f_code.co_filename
        ]
        if isinstance(error, torch.OutOfMemoryError) or not frames:
            raise
        frame, line = frames[-1]
        where = frame.f_code.co_filename
        place = f"{'/'.join(where.split('/')[-2:])}:{line}"
        if any(part in where for part in _OF_MODELS):
            raise UserError(f"{name}: its own code fails on this data ({place}): {reason_of(error)}") from error
        if _OF_ADAPTERS not in where:
            raise
        layer = _adapted_layer([frame for frame, _ in frames])
        raise UserError(
            f"{name}: PEFT's adapter on {layer} fails ({place}): {first_line(error)}; leave that layer out: "
            "--lora_exclude_modules"
        ) from error


def reason_of(error: Exception) -> str:
    """What an error in a model's forward says, and what may help."""
    said = str(error)
    if "leaf Variable" in said:  # which checkpoints make of the embedding's output, and BLT and GIT add to it in place
        return f"{first_line(error)}; try --gradient_checkpointing false"
    if "dtypes match" in said and "BFloat16" in said:  # X-MOD puts what autocast has rounded among other numbers
        return f"{first_line(error)}; try --bf16 false"
    return first_line(error)


def _adapted_layer(frames: Sequence[FrameType]) -> str:
    """Name and type of the layer whose adapter the last of these frames is in."""
    modules = [own for frame in frames if isinstance(own := frame.f_locals.get("self"), nn.Module)]
    if not modules:
        return "a layer"
    whole, layer = modules[0], modules[-1]
    name = next((name for name, each in whole.named_modules() if each is layer and name), "a layer")
    return f"{name} ({type(getattr(layer, 'base_layer', layer)).__name__})"


def check_checkpointing(asked: bool | None, model: Any) -> bool:
    """Whether activations are recomputed in the backward pass; if nothing is said, they are if the model can do it.

    Raises:
        UserError: it was asked for, and cannot.
    """
    able = bool(getattr(model, "supports_gradient_checkpointing", True))
    if asked and not able:
        raise UserError(f"--gradient_checkpointing true: {_name(model)} has none: leave it out, or say false")
    return able if asked is None else asked


def largest_id(ids: Iterable[Sequence[int]]) -> int:
    """The largest of the token ids in rows."""
    return max((max(row) for row in ids if len(row)), default=0)
