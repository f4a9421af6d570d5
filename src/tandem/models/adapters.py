"""Merges an adapter into the weights of its base. The merged model computes what the two computed together."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tandem.errors import UserError
from tandem.model_folder import ADAPTER_CONFIG, adapter_config
from tandem.runs import write_json

if TYPE_CHECKING:
    from peft import PeftModel


def weights_are_sent() -> bool:
    """Whether one process per machine loads a model and accelerate sends the others their shards: FSDP with
    `fsdp_cpu_ram_efficient_loading`."""
    from transformers.modeling_utils import is_fsdp_enabled

    return bool(is_fsdp_enabled())


def merged(model: "PeftModel") -> PreTrainedModel:
    """The base of `model` with the active adapter in its weights; `model` is of no use afterwards.

    Where the adapter changes only one of two tied layers, the embedding or the head, they are no longer tied. In half
    precision weights would be rounded more than once: merge in float32, and round the result (`rounded`).

    Raises:
        UserError: the adapter cannot be expressed as a change of weights, or its weights are not finite.
    """
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model.base_model, BaseTuner):
        kind = model.peft_config[model.active_adapter].peft_type
        raise UserError(f"cannot be merged: {getattr(kind, 'value', kind)} is no change of its base's weights")
    untie(model.get_base_model())
    try:
        if _is_on_meta(model):  # what the merge gives is sent
            whole: PreTrainedModel = model.base_model.unload()
        else:
            whole = model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"cannot be merged: {str(error).strip().splitlines()[0]}") from error
    _settle_tie(whole)
    return whole


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` in `dtype`, less what its architecture keeps in float32, as transformers loads it."""
    kept = kept_in_float32(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
    return model


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Parts of the names of weights that stay float32 in a model of `dtype`."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return kept


def _is_on_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def _of_first(value: bool) -> bool:
    """The first process's value, where that one's weights are sent to the others. Collective there."""
    if not weights_are_sent():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def sort_config(folder: str | Path) -> None:
    """Sort the lists that PEFT writes from sets into a saved adapter's configuration.

    A set of strings has another order in each process, so that one run could leave different bytes each time, and count
    as another model wherever contents are compared.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.exists():
        return
    config = adapter_config(folder)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    write_json(file, config)


def _inside(module: Any) -> Any:
    """The model's own layer inside all of PEFT's wrappers."""
    while True:
        for name in ("base_layer", "original_module"):
            if isinstance(inner := getattr(module, name, None), nn.Module):
                module = inner
                break
        else:
            return module


def untie(model: PreTrainedModel) -> None:
    """Give a head whose weight is the embedding's a copy of its own, where either of them has an adapter."""
    wrapped = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = map(_inside, wrapped)
    if head is None or getattr(head, "weight", None) is not embedding.weight or wrapped == (embedding, head):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def _settle_tie(model: PreTrainedModel) -> None:
    """Have the configuration say whether head and embedding are one, and make them one where they are equal."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not model.config.tie_word_embeddings or head is None or head.weight is embedding.weight:
        return
    if _of_first(not _is_on_meta(model) and torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
