"""Layers of a linear type whose forward is not linear: they get no adapter of linear layers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def own_forwards(model: Any) -> list[str]:
    """Names of the layers of a subclass of nn.Linear whose outputs are not the product with its weights, but the head.

    PEFT goes by the type, and adds to such a layer's outputs (of DeepSeek-V4's a matrix for each group of its inputs)
    a change of another shape or meaning. A forward that is written in another way and comes to the same (Falcon's) is
    none of these, and a quantization's layers are not looked at: PEFT has its own for them.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    known: dict[tuple[type, int, int], bool] = {}
    found = []
    for name, module in model.named_modules():
        if module is head or not isinstance(module, nn.Linear) or _is_quantized(module):
            continue
        kind = type(module), module.in_features, module.out_features
        if kind[0].forward is nn.Linear.forward:
            continue
        if kind not in known:
            known[kind] = _is_product(module)
        if not known[kind]:
            found.append(name)
    return found


def _is_quantized(layer: nn.Linear) -> bool:
    weight = layer.weight
    is_of_numbers = weight.is_floating_point() and weight.element_size() > 1
    return type(layer).__module__.startswith("bitsandbytes") or not is_of_numbers


def _is_product(layer: nn.Linear) -> bool:
    """Whether it maps random inputs by random weights as nn.Linear does; its own weights may be elsewhere."""
    draws = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(layer.out_features, layer.in_features, generator=draws, device="cpu")
    bias = None if layer.bias is None else torch.randn(layer.out_features, generator=draws, device="cpu")
    inputs = torch.randn(2, 3, layer.in_features, generator=draws, device="cpu")
    twin = copy.copy(layer)
    twin._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    try:
        with torch.no_grad():
            outputs = type(twin).forward(twin, inputs)
    except Exception:  # whatever another's code may raise over inputs that it does not take
        return False
    expected = linear(inputs, weight, bias)
    if not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
        return False
    return torch.allclose(outputs, expected, rtol=1e-4, atol=1e-4 * layer.in_features**0.5)
