"""The adapter that a run gives its policy."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tandem.models.load import commit_of
from tandem.models.own_forward import own_forwards
from tandem.models.reached import beside_text, routers
from tandem.options.model import LoraOptions, ModelOptions

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(options: LoraOptions, base: ModelOptions | None = None, model: Any = None) -> "LoraConfig | None":
    """The PEFT configuration of `options`, or None without `--use_peft`.

    Args:
        base: options of the model that is adapted; the adapter's config names its revision.
        model: the model itself. Of it, `all-linear` means what text reaches (an adapter of a tower for images or sound
            would never get a gradient) but no router, since what chooses experts stays as it was trained, and no layer
            that is linear by its type alone. `--lora_exclude_modules` leaves out more.
    """
    if not options.use_peft:
        return None
    from peft import LoraConfig

    # As in TRL: a single name is a regex, several are endings of names
    targets, excluded = (
        names[0] if len(names) == 1 else names or None
        for names in (options.lora_target_modules, options.lora_exclude_modules)
    )
    if targets == "all-linear" and model is not None:
        excluded = _both(excluded, [*_beside_text(model), *_read_alone(model), *routers(model), *own_forwards(model)])
    if options.lora_layers_to_transform and isinstance(targets, str):  # PEFT takes only a list of names then
        targets = _linear_ends(model) if targets == "all-linear" and model is not None else [targets]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        exclude_modules=excluded,
        target_parameters=options.lora_target_parameters or None,
        modules_to_save=options.lora_modules_to_save or None,
        layers_to_transform=options.lora_layers_to_transform or None,
        layers_pattern=options.lora_layers_pattern or None,
        rank_pattern=options.lora_rank_pattern or {},
        alpha_pattern=options.lora_alpha_pattern or {},
        lora_bias=options.lora_bias,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        init_lora_weights=True if options.init_lora_weights == "true" else options.init_lora_weights,
        revision=_revision(base) if base is not None else None,
    )
    if targets == "all-linear" and model is not None:
        _settle_experts(config, options, model)
    return config


def left_out(model: Any) -> list[str]:
    """The layers that the adapter left out for their forward (`own_forwards`): the ends of their names, and how many.

    Args:
        model: a `PeftModel`.
    """
    excluded = getattr(model.peft_config[model.active_adapter], "exclude_modules", None) or ()
    base = model.get_base_model()
    chosen = set(own_forwards(base)).difference(routers(base))
    if isinstance(excluded, str):
        found = [name for name in chosen if re.fullmatch(excluded, name)]
    else:
        found = [name for name in chosen if name in excluded]
    ends = Counter(name.rpartition(".")[2] for name in found)
    return [f"{end} ({number})" for end, number in sorted(ends.items())]


def _both(asked: str | list[str] | None, names: list[str]) -> str | list[str] | None:
    """The modules to leave out: those asked for, by a regex or by the ends of names, and these layers."""
    if isinstance(asked, str):
        return "|".join([f"(?:{asked})", *map(re.escape, names)]) if names else asked
    return [*(asked or ()), *dict.fromkeys(names)] or None


def _settle_experts(config: Any, options: LoraOptions, model: Any) -> None:
    """Have `all-linear` of Mixtral's and Qwen's experts mean the experts and not the router, and none of them where an
    adapter of parameters cannot have what is asked for.

    Their matrices are parameters since transformers 5, and PEFT 0.21 has `all-linear` mean them and the router's.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # PEFT 0.17, of Gaudi's environment, beside transformers 4
        return
    named = set(options.lora_target_parameters)
    conversion._convert_peft_config_moe(config, model)
    added = set(config.target_parameters or ()) - named
    if options.lora_dropout or options.use_dora or options.lora_bias:
        added = set()
        config.rank_pattern, config.alpha_pattern = options.lora_rank_pattern or {}, options.lora_alpha_pattern or {}
    config.target_parameters = sorted(named | {name for name in added if name != "gate.weight"}) or None


def _read_alone(model: Any) -> list[str]:
    """Names of the linear layers whose weights alone are read in training, so that an adapter's change would not count:
    those of Mamba's mixers, by its fused kernels or by every forward (of the layer out PEFT refuses an adapter, of the
    others it does not), and Gemma 3n's clamped coefficients."""
    found = []
    for name, module in model.named_modules():
        whole, _, end = name.rpartition(".")
        if not isinstance(module, torch.nn.Linear) or end not in ("out_proj", "dt_proj", "x_proj", "correction_coefs"):
            continue
        if end == "correction_coefs" or "mamba" in (name + type(model.get_submodule(whole)).__name__).lower():
            found.append(name)
    return found


def _linear_ends(model: Any) -> list[str]:
    """The ends of the names of the decoder's linear layers, as `all-linear` stands for."""
    decoder = model.get_decoder()
    return sorted({n.rpartition(".")[2] for n, each in decoder.named_modules() if isinstance(each, torch.nn.Linear)})


def _beside_text(model: Any) -> list[str]:
    """Names of the linear layers that text does not reach."""
    names = []
    for part in beside_text(model):
        for name, module in model.get_submodule(part).named_modules():
            if isinstance(module, torch.nn.Linear):
                names.append(f"{part}.{name}" if name else part)
    return names


def _revision(model: ModelOptions) -> str | None:
    """What was asked for, or the commit of a Hub model: its main branch may be another one tomorrow."""
    name = model.model_name_or_path
    return model.model_revision or (None if Path(name).is_dir() else commit_of(name, None))
