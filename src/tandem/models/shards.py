"""Models that transformers shards over processes as it loads them: each reads its own part of the files."""

from pathlib import Path

from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tandem.errors import UserError
from tandem.model_folder import ADAPTER_WEIGHTS, adapter_config


def check_adapter(folder: str) -> None:
    """Refuse an adapter that cannot be put on a sharded base as it is loaded.

    Raises:
        UserError: it is more than LoRA's two matrices, and would need its base's weights whole.
    """
    try:
        config = adapter_config(folder)
    except UserError:
        return  # whoever loads it says so
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "bias")
    beyond = [name for name in more if config.get(name) not in (None, False, [], {}, "none")]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        beyond.append(f"init_lora_weights {config['init_lora_weights']}")
    if _adapts_embedding(Path(folder)):
        beyond.append("an adapted embedding")
    if config.get("peft_type") != "LORA" or beyond:
        what = ", ".join(beyond) or config.get("peft_type")
        raise UserError(
            f"{folder}: an adapter with {what} needs its base whole, and FSDP shards it: merge the adapter first "
            "(scripts/merge_lora.py)"
        )


def _adapts_embedding(folder: Path) -> bool:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as weights:
        return any("lora_embedding" in name for name in weights.keys())  # noqa: SIM118  it is no mapping


def gather_tied_head(model: PreTrainedModel) -> None:
    """Have FSDP gather a tied head with the embedding whose weight it is.

    transformers 5.23 shards the embedding without its head (`distributed.fsdp._resolve_tied_embed_lm_head_plan`). The
    head would keep the sharded weight, and its gradient would be that of this process's pairs alone.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for sharded in group.fsdp_params if group else ():
            info = sharded._module_info
            if info.module is embedding and head not in info.shared_modules:
                info.shared_modules.append(head)
                info.shared_param_names.append("weight")
