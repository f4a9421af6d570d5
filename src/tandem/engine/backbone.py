"""The part of a model that computes hidden states, and the balance of its experts, whatever their names in the model.

TRL asks `base_model` for the states and the configuration for `num_experts`. Llama 4's `base_model` is the whole model,
Granite 4 calls it `num_local_experts`, and others have other names again.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

# A token's experts, by the names that configurations have for their number
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


def backbone(model: PreTrainedModel) -> Any:
    """The part of `model` that returns `last_hidden_state`: looked up on each call, since FSDP and PEFT replace it."""
    if model.base_model is not model:
        return model.base_model
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            inside = {id(each) for each in module.modules()}
            if id(words) in inside and id(head) not in inside:
                return module
    return model


def served_by_trl(model: PreTrainedModel) -> bool:
    """Whether TRL's fused forward finds what it reads of `model` and its configuration: of experts their number, and
    the experts themselves (Doge and Qwen's MoE can be configured without)."""
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits") and not (
        hasattr(config, "num_experts")
        and hasattr(config, "num_experts_per_tok")
        and any(name.endswith("experts") for name, _ in model.named_modules())
    ):
        return False
    return model.base_model is not model


def balance_loss(
    router_logits: Iterable[Tensor | None] | None, config: PreTrainedConfig, weights: Tensor | None, like: Tensor
) -> Tensor:
    """How unevenly tokens go to experts, as TRL takes it: Mixtral's loss over all layers, 1.0 where all have as many
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6, without its factor). Zero of a model without experts.

    Args:
        router_logits: of each layer that has experts, (tokens, experts), or with the tokens in two dimensions.
        config: of the text model.
        weights: (B, S) or (1, T), how often each token counts; None: once.
        like: a tensor on the device and in the type of the result.
    """
    layers = [each.reshape(-1, each.shape[-1]) for each in router_logits or () if each is not None]
    if not layers:
        return like.new_zeros(())
    taken = next((value for name in _PER_TOKEN if isinstance(value := getattr(config, name, None), int)), 1)
    loss: Any = load_balancing_loss_func(tuple(layers), layers[0].shape[-1], taken, weights)
    return loss if isinstance(loss, torch.Tensor) else like.new_zeros(())
