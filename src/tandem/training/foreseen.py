"""A model whose weights are not read: its parameters on the meta device, and the layout that its run will take.

The layout is found by a probe, as in the run, but on a model of few layers with random weights.
"""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.engine import own_logits
from tandem.engine.choice import Findings, LayoutChoice, LayoutReport
from tandem.engine.forward import add_pair_forward
from tandem.engine.layout import Layout
from tandem.errors import UserError, first_line
from tandem.models.configuration import LOADING_ERRORS, read_config
from tandem.models.fits import adapter_told
from tandem.models.lora import lora_config
from tandem.models.reached import hold_still
from tandem.monitor.memory import GIB
from tandem.options.model import LoraOptions, ModelOptions, is_adapter

# The outputs that TRL 1.16's trainers ask of the fused forward for their metrics
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
# The most bytes of random weights that are drawn for a probe
LIMIT = 2 * GIB
# So many more layers are tried where a model cannot have as few as wanted
_MORE = 16


class _Silent(Findings):
    """Drops messages, since a trial for a plan is not a run."""

    def say_once(self, level: int, line: str) -> None:
        pass


def config_of(options: ModelOptions) -> Any:
    """The configuration of a model, or of an adapter's base, with the dtype that is asked for.

    Raises:
        UserError: as in `read_config`.
    """
    name, revision = options.model_name_or_path, options.model_revision
    config = read_config(name, revision, trust_remote_code=options.trust_remote_code)
    config.use_cache = False
    if options.dtype != "auto" or getattr(config, "dtype", None) is None:
        config.dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    return config


def depth(config: Any) -> int:
    """How many layers the text model has; 1 if the configuration has no single number of layers (BLT)."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", None) or 1)


def shortened(config: Any, layers: int) -> Any:
    """A copy whose text model has only its first layers, at least one; all of them if it cannot have fewer."""
    config = copy.deepcopy(config)
    text, whole = config.get_text_config(), depth(config)
    if layers >= whole:
        return config
    try:
        text.num_hidden_layers = layers
    except NotImplementedError:  # ProphetNet has no single number of layers
        return config
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole and ("layer" in name or "block" in name):
            setattr(text, name, value[:layers])
    # LongCat counts a layer as two, and RWKV divides by all layers but one
    while text.num_hidden_layers < (2 if text.model_type == "rwkv" else 1):
        layers += 1
        text.num_hidden_layers = layers
    return config


def layers_of_all_kinds(config: Any) -> int:
    """How many layers, from the first on, include each kind of layer that the configuration names."""
    text, needed = config.get_text_config(), 1
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, list | tuple):
            needed = max(needed, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return min(needed, depth(config))


def model_of(config: Any, options: ModelOptions, device: str) -> Any:
    """A model of random weights on `device`, or without values on the meta device.

    Raises:
        UserError: transformers has no causal language model of this configuration.
    """
    named = _named_class(config)
    try:
        with torch.device(device):
            if named is not None:
                return named._from_config(config, dtype=config.dtype)
            return AutoModelForCausalLM.from_config(
                config, dtype=config.dtype, trust_remote_code=options.trust_remote_code
            )
    except LOADING_ERRORS as error:
        name = options.model_name_or_path
        raise UserError(f"{name}: cannot be built as a causal language model: {first_line(error)}") from error


def least(config: Any, options: ModelOptions, layers: int) -> Any:
    """`shortened` to as few layers, from `layers` on, as make a model: Zamba ties those of a kind to each other.

    Raises:
        UserError: as in `model_of`.
    """
    for count in range(layers, min(layers + _MORE, depth(config))):
        candidate = shortened(config, count)
        with contextlib.suppress(UserError):
            model_of(candidate, options, "meta")
            return candidate
    return shortened(config, layers + _MORE)


def _named_class(config: Any) -> Any:
    """The class of transformers that a configuration names, which TRL 1.16 loads; None if it names none. transformers'
    table of causal language models lacks those of several modalities, and of some the text part."""
    names = getattr(config, "architectures", None) or ("",)
    named = getattr(transformers, names[0], None)
    own = getattr(named, "config_class", None)
    return named if own is not None and isinstance(config, own) else None


def build(
    options: ModelOptions,
    lora: LoraOptions,
    *,
    checkpoints: bool,
    layers: int | None = None,
    report: LayoutReport | None = None,
) -> Any:
    """The model on the meta device, with its adapter; on request with fewer layers and with gradient checkpointing.

    Args:
        report: `layout`'s; without one its logits are taken to be its head's.

    Raises:
        UserError: no config of a model is there, or the adapter is none of this model.
    """
    config = config_of(options)
    model = model_of(config if layers is None else least(config, options, layers), options, "meta")
    findings = _Silent()
    if report is not None:
        findings.made_by_head[type(model).__name__] = report.reason != own_logits.REASON
    add_pair_forward(model, outputs=OUTPUTS, layout="padded", findings=findings)
    if checkpoints and model.supports_gradient_checkpointing:
        # Fake tensors have no random state to keep
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if (adapter := _adapter(options, lora, model)) is not None:
        from peft import get_peft_model

        with adapter_told():
            model = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    else:
        hold_still(model)
    return model.train()


def _adapter(options: ModelOptions, lora: LoraOptions, model: Any) -> Any:
    if not is_adapter(options.model_name_or_path):
        plain = dataclasses.replace(lora, init_lora_weights="true") if lora.use_peft else lora  # there are no values
        return lora_config(plain, model=model)
    from peft import PeftConfig

    existing = PeftConfig.from_pretrained(options.model_name_or_path)
    existing.inference_mode = False
    return existing


def layout(options: ModelOptions, asked: Layout, input_ids: Tensor, longest: int) -> LayoutReport:
    """The layout that a run will take, and, if it is not the one asked for, why.

    Args:
        asked: the layout that the run is asked to take.
        input_ids: ids of the run's data, of any shape, int64.
        longest: tokens of its longest row.

    Returns:
        a report without a `difference` where nothing was probed: the layout does not depend on it, or the model is too
        large for it. Its reason may also be that the logits are not the head's (`own_logits`).

    Raises:
        UserError: as in `model_of`.
    """
    config = config_of(options)
    choice = LayoutChoice(model_of(config, options, "meta"), layout=asked, findings=_Silent())
    config = least(config, options, layers_of_all_kinds(config))
    config.dtype = torch.float32  # so that rounding hides as little as possible
    size = sum(4 * parameter.numel() for parameter in model_of(config, options, "meta").parameters())
    if size > LIMIT:
        return choice.report or LayoutReport(choice.name, asked)
    with _seeded(), tempfile.TemporaryDirectory() as folder:
        model = model_of(config, options, "cpu").eval()
        reports: list[LayoutReport] = []
        add_pair_forward(
            model, layout=asked, longest=longest, cache_dir=folder, on_report=reports.append, findings=_Silent()
        )
        rows = input_ids.flatten()[:longest].expand(2, -1)
        try:
            with torch.no_grad():
                model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows.clone(), fused_lm_head=True)
        except LOADING_ERRORS as error:
            name = options.model_name_or_path
            raise UserError(f"{name}: cannot be forwarded on text ({choice.name}): {first_line(error)}") from error
    return reports[-1]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Within the block, random numbers are the same each time; the state of the generators is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
