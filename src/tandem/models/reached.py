"""Which parts of a model text reaches, and which choose experts: towers for images and routers are not trained."""

from collections.abc import Iterator
from typing import Any

from torch import nn

# The names of the number of experts in configurations
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOOSING = ("expert_bias", "e_score_correction_bias", "correction_bias")
_UNPASSED = {
    "indexer", "encoder_attn", "encoder_attn_layer_norm", "crossattention", "cross_attn", "cross_attn_layer_norm",
    "pooler", "patcher", "visual_projection", "embed_tokens_extend",
}  # fmt: skip
_GATES = ("gate", "shared_expert_gate", "shared_experts_gate", "wg")


def beside_text(model: Any) -> list[str]:
    """Names of the modules that text does not pass: towers for images and sound, and what leads from them to the
    decoder. Of such a part only its outermost module."""
    config = model.config
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if config.get_text_config() is not config and decoder is not model:
        inside = [decoder, model.get_output_embeddings(), model.get_input_embeddings()]
        return sorted(
            _outermost(model, "", {id(module) for part in inside if part is not None for module in part.modules()})
        )
    others = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    others = [each for each in others if each is not None and each is not config.get_text_config()]
    towers = {
        name: module
        for name, module in model.named_modules()
        if name and any(getattr(module, "config", None) is each for each in others)
    }
    words = model.get_input_embeddings()
    if any(module is words for tower in towers.values() for module in tower.modules()):
        return []  # these are the text model's own parts, each with a configuration (BLT)
    found = list(towers)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _outermost(module: nn.Module, name: str, inside: set[int]) -> Iterator[str]:
    """Names of the largest parts that have parameters, and none of the modules `inside`."""
    if id(module) in inside:
        return
    if not any(id(each) in inside for each in module.modules()):
        if next(module.parameters(), None) is not None:
            yield name
        return
    for part, child in module.named_children():
        yield from _outermost(child, f"{name}.{part}" if name else part, inside)


def hold_still(model: Any) -> None:
    """Train nothing that gets no gradient: DDP would stop over it, and the optimizer would keep its state.

    That is what text does not pass, what attends to an encoder that is not there, a table of sines, and what only
    chooses: which keys are attended to (indexers of DeepSeek's sparse attention), which experts are taken (a bias in
    that choice alone), where BLT's patches end.
    """
    for name in beside_text(model):
        model.get_submodule(name).requires_grad_(False)
    for name in _unpassed(model):
        model.get_submodule(name).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in _CHOOSING:
            parameter.requires_grad_(False)
    for module in model.modules():
        if "sinusoidal" in type(module).__name__.lower():
            module.requires_grad_(False)


def _unpassed(model: Any) -> list[str]:
    """Names of the parts of a decoder that text alone does not pass, or that get no gradient from it; of Mllama's
    layers those that attend to images, whole."""
    return [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _UNPASSED or type(module).__name__.endswith("CrossAttentionDecoderLayer")
    ]


def routers(model: Any) -> list[str]:
    """Names of the linear layers that choose experts or keys, or weigh a shared expert; and of those that no text
    passes in a decoder without its encoder."""
    config = model.config.get_text_config()
    counts = {value for name in _NUMBERS if isinstance(value := getattr(config, name, None), int) and value > 1}
    unpassed = tuple(f"{name}." for name in _unpassed(model))
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        gate = bool(counts) and parts[-1] in _GATES and module.out_features in counts | {1}
        if gate or f"{name}.".startswith(unpassed) or any("router" in part for part in parts):
            found.append(name)
    return found


def expert_parameters(model: Any) -> list[str]:
    """The ends of the names of parameters that hold the matrices of all experts of a layer, which no adapter of linear
    layers changes."""
    ends = {
        ".".join(name.split(".")[-3:])
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and ".experts." in f".{name}"
    }
    return sorted(ends)
