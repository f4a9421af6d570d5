"""Which layout a model is forwarded in: the one asked for, unless the probe finds that it changes the log-probs."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tandem.engine import attention, kernels, probe
from tandem.engine.attention import Backend
from tandem.engine.layout import Layout
from tandem.engine.modes import evaluating
from tandem.engine.precision import computed_in, is_sharded, same_autocast, tolerance
from tandem.ranks import is_first

logger = logging.getLogger("tandem.engine")

# Layers whose memory along the row is attention, which the layout restricts; a recurrent state would leak across pairs
_SERVED_LAYERS = {"full_attention", "sliding_attention"}

Scoring = Callable[[dict[str, Tensor]], Tensor]
"""The probe's batch → its (4, S − 1) log-probs in nats."""


class Findings:
    """What was measured and logged about layouts. Policy and reference have one architecture, and share it."""

    def __init__(self) -> None:
        self.gaps: dict[str, float] = {}
        self.made_by_head: dict[str, bool] = {}  # by the model's class: see `own_logits.made_by_head`
        self._said: set[str] = set()

    def say_once(self, level: int, line: str) -> None:
        """Log a line once, even if both models lead to it."""
        if line not in self._said:
            self._said.add(line)
            logger.log(level, line)


@dataclass(frozen=True)
class LayoutReport:
    """Which layout a model is forwarded in, and why.

    Attributes:
        model: class of the model.
        layout: the layout in use.
        reason: why it is not the one asked for; empty where it is.
        difference: the probe's, see `probe.difference`; None where no probe was needed.
    """

    model: str
    layout: Layout
    reason: str = ""
    difference: float | None = None

    def __str__(self) -> str:
        line = f"{self.model}: layout {self.layout}"
        if self.reason:
            line += f", because {self.reason}"
        elif self.difference is not None:
            line += f" (differs from padded by {self.difference:.1e} per token)"
        return line


class LayoutRequest(TypedDict, total=False):
    """What a model is asked to be forwarded in.

    Attributes:
        layout: `shared`, `packed`, or `padded` for TRL's own forward. Default: `shared`.
        backend: of the attention, see `PairAttention`. Default: `auto`.
        cache_dir: folder of the probe's memory.
        longest: tokens of the longest row that will come; 0, the default, where that is not known. Sharded weights can
            then be probed only once: the processes see rows of different lengths, and would not probe again together.
        on_report: called whenever a layout is settled, so again after a probe of longer rows.
        findings: shared with other models. Default: none are.
    """

    layout: Layout
    backend: Backend
    cache_dir: str | Path
    longest: int
    on_report: Callable[[LayoutReport], None] | None
    findings: Findings


class LayoutChoice:
    """The layout of one model, decided at its first batch, and again for rows longer than any that were probed.

    Args:
        model: before it is wrapped.
        asked: see `LayoutRequest`.
    """

    def __init__(self, model: PreTrainedModel, **asked: Unpack[LayoutRequest]) -> None:
        layout = self.layout = asked.get("layout", "shared")
        self.backend = asked.get("backend", "auto")
        self.cache = probe.ProbeCache(asked.get("cache_dir", probe.DEFAULT_CACHE))
        self.longest = asked.get("longest", 0)
        self.on_report = asked.get("on_report")
        self.findings = asked.get("findings") or Findings()
        self.report: LayoutReport | None = None
        self.probed = 0  # tokens of the longest row that the report is about
        self.name = type(model).__name__
        if layout == "padded":
            self.settle("padded", "it was asked for")
        elif reason := _unserved_architecture(model):
            self.settle("padded", reason)

    @property
    def is_padded(self) -> bool:
        """Whether it is settled that TRL's forward is taken."""
        return self.report is not None and self.report.layout == "padded"

    def settle(self, layout: Layout, reason: str = "", difference: float | None = None) -> None:
        """Forward in `layout` from now on."""
        first = self.report is None
        self.report = LayoutReport(self.name, layout, reason, difference)
        level = logging.INFO if layout == self.layout else logging.WARNING
        if first or level == logging.WARNING:
            self.findings.say_once(level, str(self.report))
        if self.on_report is not None:
            self.on_report(self.report)

    def needs_probe(self, model: PreTrainedModel, length: int) -> bool:
        """Whether rows of `length` tokens are longer than what is known to agree."""
        if self.is_padded:
            return False
        return self.report is None or (length > self.probed and not is_sharded(model))

    def covers(self, length: int) -> bool:
        """Whether rows of `length` tokens are among those that were probed."""
        return length <= self.probed

    def probe(self, model: PreTrainedModel, input_ids: Tensor, padded: Scoring, packed: Scoring) -> None:
        """Score the probe's pairs in both layouts, as the model is called now, and settle. Collective where it is
        sharded.

        Args:
            input_ids: a batch, (2B, S) int64, whose tokens the probe's pairs are made of, at least as long.
            padded, packed: how to score in either layout.
        """
        device, collective = input_ids.device, is_sharded(model)
        length = probe.length_for(model, max(input_ids.shape[1], self.longest))
        dtype = computed_in(model, device.type)
        key = self.key(model, device, dtype, length)
        gap = self.findings.gaps.get(key, self.cache.read(key))
        if collective:  # all processes forward it, or none
            gap = broadcast_object_list([gap])[0]
        failure = ""
        if gap is None:
            batch = probe.probe_batch(model, input_ids, length)
            with torch.no_grad(), evaluating(model), same_autocast(device.type):
                reference = padded(batch)
                try:
                    gap = probe.difference(reference, packed(batch), batch["labels"])
                # An architecture may fail in any way on a row it was not written for; TRL's forward still works
                except Exception as error:
                    failure, gap = f"the packed row fails with {type(error).__name__}: {error}", float("nan")
            if collective:
                results = gather_object([(gap, failure)])
                gap, failure = max(results, key=lambda result: (result[0] != result[0], result[0]))
            self.findings.gaps[key] = gap
            if gap == gap and is_first():
                self.cache.write(key, gap)
        self.probed = max(length, input_ids.shape[1], self.longest)
        limit = tolerance(dtype)
        if gap <= limit:
            self.settle(self.layout, difference=gap)
            return
        for config in attention_configs(model):
            attention.restore_implementation(config)
        words = f"its log-probs differ by {gap:.1e} per token between layouts, more than {limit:.0e}"
        self.settle("padded", failure or words, gap)

    def key(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, length: int) -> str:
        """The key that the probe's outcome is kept under, of everything that can change it."""
        original = str(model.config.get_text_config()._attn_implementation)
        return self.cache.key(
            model,
            layout=self.layout,
            backend=self.backend,
            dtype=str(model.dtype),
            computed=str(dtype),
            autocast=torch.is_autocast_enabled(device.type),
            device=device.type,
            kernel=kernels.description(device, dtype),
            attention=attention.original_implementation(original),
            length=length,
        )


def _unserved_architecture(model: PreTrainedModel) -> str:
    """Why the model cannot run an attention function that is not its own; empty where it can."""
    decoder = model.get_decoder()
    if not getattr(decoder, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    other = set(getattr(decoder.config, "layer_types", None) or ()) - _SERVED_LAYERS
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    if window := _window_by_mask(decoder):
        return f"its layers have their window of {window} tokens from a mask"
    return ""


def _window_by_mask(decoder: Any) -> int:
    """The sliding window of layers that do not hand it to their attention function, which is given no mask; else 0.

    Over rows of half precision the probe may take a window that is not there for rounding.
    """
    config = decoder.config
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    longest = getattr(config, "max_position_embeddings", None) or window + 1
    if getattr(config, "use_sliding_window", True) is False or "sliding_attention" not in kinds or window >= longest:
        return 0
    code = [_code_of(kind.forward) for kind in {type(module) for module in decoder.modules()}]
    return 0 if any("attention_interface" in each and "sliding_window" in each for each in code) else window


def _code_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # of a model whose code is not there
        return ""


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs the decoder's layers read their attention implementation from, usually one."""
    decoder = model.get_decoder()
    configs = (getattr(module, "config", None) for module in decoder.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())
