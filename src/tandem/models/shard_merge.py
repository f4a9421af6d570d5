"""A LoRA adapter merged into its base file by file, so that no more than one of the base's files is in memory."""

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tandem.errors import UserError
from tandem.model_folder import ADAPTER_WEIGHTS, INDEX, WEIGHTS, indexed_files
from tandem.models.adapters import kept_in_float32
from tandem.models.load import load_adapter, load_model, weight_files
from tandem.models.shards import check_adapter
from tandem.options.model import ModelOptions, is_adapter


def merge_files(base: ModelOptions, adapter: str, dtype: torch.dtype, folder: Path) -> Any:
    """Write the weights of `base` with `adapter` merged into them to `folder`, in files as the base's, each merged in
    float32 and rounded once to `dtype`: bit for bit what `adapters.merged` and `rounded` give.

    Returns:
        The merged model on the meta device, with its configuration; None, with nothing written, if a merge file by file
        is not possible: the adapter is more than LoRA's two matrices, the base is an adapter itself, or transformers
        renames or joins weights when it loads them.

    Raises:
        UserError: merged weights that are not finite, or what cannot be loaded.
    """
    files = _files(base)
    if not files or not _is_plain(adapter):
        return None
    model = load_model(
        ModelOptions(base.model_name_or_path, dtype="float32", model_revision=base.model_revision), meta=True
    )
    adapted = load_adapter(model, adapter)
    layers = {
        f"{name}.weight": layer
        for name, layer in adapted.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    names = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118  no mapping
    whole = adapted.state_dict().keys()
    expected = {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in whole if ".lora_" not in name
    }
    if not layers.keys() <= names or not names <= expected or any(_is_more(layer) for layer in layers.values()):
        return None
    if not _fill(layers, load_file(Path(adapter) / ADAPTER_WEIGHTS)):
        return None
    total = 0
    for file in files:
        merged = _merged(file, layers, dtype, kept_in_float32(model, dtype))
        total += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
        broken = next((name for name in merged if name in layers and not merged[name].isfinite().all()), None)
        if broken:
            raise UserError(f"--adapter {adapter}: cannot be merged: NaN or infinity in {broken}")
        save_file(merged, folder / file.name, metadata={"format": "pt"})
        del merged
    index = files[0].parent / INDEX
    if index.is_file():
        described = json.loads(index.read_text())
        described["metadata"] = {"total_size": total}
        (folder / INDEX).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    return adapted.unload()


def save_config(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write the configuration of a model whose weights of `dtype` are in `folder` already."""
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)  # transformers 4 has the second
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _files(base: ModelOptions) -> list[Path]:
    if is_adapter(base.model_name_or_path):
        return []
    files = weight_files(base)
    weights = [file for file in files if file.suffix == ".safetensors"]
    named = indexed_files(files[0].parent) if files else None
    if named is None:
        return weights if [file.name for file in weights] == [WEIGHTS] else []
    return [file for file in weights if file.name in named]


def _is_plain(adapter: str) -> bool:
    try:
        check_adapter(adapter)
    except UserError:
        return False
    return True


def _is_more(layer: LoraLayer) -> bool:
    (name,) = layer.lora_A.keys()
    return bool(layer.lora_variant or layer.lora_bias[name])


def _fill(layers: dict[str, LoraLayer], weights: dict[str, torch.Tensor]) -> bool:
    """Give the layers, by the names of their weights, their matrices; False where these are not all of `weights`."""
    for name, layer in layers.items():
        for matrix, modules in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            found = weights.pop(f"base_model.model.{name.removesuffix('.weight')}.{matrix}.weight", None)
            if found is None:
                return False
            (module,) = modules.values()
            module.weight = torch.nn.Parameter(found.float(), requires_grad=False)
    return not weights


def _merged(file: Path, layers: dict[str, LoraLayer], dtype: torch.dtype, kept: set[str]) -> dict[str, torch.Tensor]:
    """The tensors of one file, merged and rounded."""
    merged = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  it is no mapping
            tensor = tensors.get_tensor(name)
            if name in layers:
                (adapter,) = layers[name].lora_A.keys()
                tensor = tensor.float() + layers[name].get_delta_weight(adapter)  # type: ignore[operator]
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if any(part in name for part in kept) else dtype)
            merged[name] = tensor.contiguous()
    return merged
