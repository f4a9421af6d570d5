"""The seam: TRL's fused forward, computed from each distinct token of a pair once.

`DPOTrainer` calls `model(**batch, labels=labels, fused_lm_head=True)` and reads per-token fields of shape (2B, S - 1)
from a `FusedCausalLMOutput`. `add_pair_forward` binds a forward to the model that answers this call from one packed
row, so that TRL's losses and metrics, PEFT, and the wrappers of DDP, FSDP and DeepSpeed all stay as they are.
"""

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tandem.engine import attention, probe
from tandem.engine.attention import PAIR_ATTENTION, Backend, PairAttention
from tandem.engine.layout import Layout, PairPlan, plan_pairs
from tandem.engine.logprobs import LogitTransform, score_tokens
from tandem.errors import UserError

SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

try:
    from trl.trainer import dpo_trainer
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head
except ImportError as error:
    raise UserError(f"the pair engine needs trl{SUPPORTED_TRL}, found {trl.__version__}: {error}") from error

logger = logging.getLogger("tandem.engine")

# What a text batch may pass beside labels; anything else (images, embeddings, positions, a cache) is TRL's to forward
_TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "use_cache", "output_router_logits", "num_items_in_batch"}
# Layers whose memory along the row is attention, which the plan restricts; a recurrent state would leak across pairs
_SERVED_LAYERS = {"full_attention", "sliding_attention"}


def check_trl_contract(version: str, installer: Callable[..., None], output: type) -> None:
    """Check what the seam relies on in TRL.

    Raises:
        UserError: naming the supported TRL version, for another version or for one that was changed.
    """
    expected = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]
    needed = {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"}
    parameters = list(inspect.signature(installer).parameters)
    missing = needed - {field.name for field in fields(output)}
    if version not in SUPPORTED_TRL:
        problem = f"found {version}"
    elif parameters != expected:
        problem = f"add_fused_lm_head takes {parameters}, not {expected}"
    elif missing:
        problem = f"FusedCausalLMOutput lacks {sorted(missing)}"
    else:
        return
    raise UserError(f"the pair engine supports trl{SUPPORTED_TRL}: {problem}; pip install 'trl{SUPPORTED_TRL}'")


check_trl_contract(trl.__version__, add_fused_lm_head, FusedCausalLMOutput)


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


def add_pair_forward(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    layout: Layout = "shared",
    backend: Backend = "auto",
    on_report: Callable[[LayoutReport], None] | None = None,
    cache_dir: str | Path = probe.DEFAULT_CACHE,
) -> None:
    """TRL's `add_fused_lm_head`, with the pair engine in front of it.

    `model(input_ids=..., attention_mask=..., labels=..., fused_lm_head=True)` on a (2B, S) batch of pairs, as TRL
    collates them, then runs the backbone once, on one row that holds each distinct token once. It returns TRL's
    fields, with no gradient on `entropy`. Batches and models it cannot serve take TRL's padded forward, and a line on
    the logger `tandem.engine` says so. The first such call probes the model (see `tandem.engine.probe`). Install it
    before the model is wrapped by PEFT or accelerate, as TRL does.

    Args:
        model: a causal language model, or a multimodal one that is given text.
        temperature, cast_lm_head_to_fp32, outputs: as in TRL.
        layout: `shared`, `packed`, or `padded` for TRL's own forward.
        backend: see `PairAttention`.
        on_report: called once with the layout that is used.
        cache_dir: folder of the probe's memory.
    """
    add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
    padded_forward = model.forward
    engine = _PairEngine(model, padded_forward, temperature, cast_lm_head_to_fp32, outputs, layout, backend, cache_dir)
    engine.on_report = on_report
    engine.start(model)

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return padded_forward(*args, **kwargs)
        return engine(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def pair_engine(
    layout: Layout = "shared",
    backend: Backend = "auto",
    on_report: Callable[[LayoutReport], None] | None = None,
    cache_dir: str | Path = probe.DEFAULT_CACHE,
) -> Iterator[None]:
    """While this is open, a `DPOTrainer` that is built gets the engine wherever TRL installs its own forward.

    That covers policy and reference, and comes before accelerate wraps them: outside its wrapper the reference would
    run without autocast. Arguments as in `add_pair_forward`.
    """
    installer = functools.partial(
        add_pair_forward, layout=layout, backend=backend, on_report=on_report, cache_dir=cache_dir
    )
    original = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = installer
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = original


def forward_plan(
    model: PreTrainedModel, plan: PairPlan, input_ids: Tensor, labels: Tensor, outputs: tuple[str, ...]
) -> FusedCausalLMOutput:
    """One forward of a plan that was made elsewhere, without a probe: for counting on tensors that hold no values.

    Args:
        model: without adapters around it; they may be in its layers.
        plan: of the batch, its tensors of the same kind as the model's.
        input_ids, labels: (2B, S) int64, as in `add_pair_forward`.
        outputs: as in `add_pair_forward`.
    """
    engine = _PairEngine(model, model.forward, 1.0, False, outputs, "shared", "auto", probe.DEFAULT_CACHE)
    return engine.forward(model, plan, input_ids=input_ids, labels=labels)


class _Unserved(Exception):
    """This batch is one for the padded forward; the message says why."""


# Differences measured in this process: the reference has the policy's architecture
_measured: dict[str, float] = {}


class _PairEngine:
    """State of one model's pair forward: what was asked for, and whether the model can be served."""

    def __init__(
        self,
        model: PreTrainedModel,
        padded_forward: Callable[..., Any],
        temperature: float,
        cast_lm_head_to_fp32: bool,
        outputs: tuple[str, ...],
        layout: Layout,
        backend: Backend,
        cache_dir: str | Path,
    ) -> None:
        self.padded_forward = padded_forward
        self.text_config = model.config.get_text_config()
        self.transform = LogitTransform.of(self.text_config, temperature)
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        self.outputs = outputs
        self.layout = layout
        self.backend = backend
        self.on_report: Callable[[LayoutReport], None] | None = None
        self.cache = probe.ProbeCache(cache_dir)
        self.known: float | None = None
        self.report: LayoutReport | None = None

    def start(self, model: PreTrainedModel) -> None:
        """Settle what can be settled without a forward."""
        name = type(model).__name__
        if self.layout == "padded":
            self.settle(LayoutReport(name, "padded", "it was asked for"))
        elif reason := _unserved_architecture(model):
            self.settle(LayoutReport(name, "padded", reason))
        else:
            # Every rank must take part in the probe, or none: under FSDP a forward is a collective
            known = [self.cache.read(self.probe_key(model))]
            self.known = broadcast_object_list(known)[0]

    def settle(self, report: LayoutReport) -> None:
        self.report = report
        _log_once(logging.INFO if report.layout == self.layout else logging.WARNING, str(report))
        if self.on_report is not None:
            self.on_report(report)

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if self.report is None and kwargs.get("shift_labels") is not None:
            self.settle(LayoutReport(type(model).__name__, "padded", "context or sequence parallelism cuts its rows"))
        if self.report is None and kwargs.get("input_ids") is not None:
            # Whether or not this batch can be served: the batches of other ranks may differ in that
            self.settle(self.probe(model, kwargs["input_ids"]))
        if self.report is None or self.report.layout != "padded":
            try:
                plan = self.plan(args, kwargs)
            except _Unserved as reason:
                _log_once(logging.WARNING, f"a batch takes the padded forward, because {reason}")
            else:
                return self.forward(model, plan, **kwargs)
        return self.padded_forward(*args, fused_lm_head=True, **kwargs)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PairPlan:
        extra = sorted(name for name, value in kwargs.items() if value is not None and name not in _TEXT_INPUTS)
        input_ids, labels, mask = (kwargs.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if extra:
            raise _Unserved(f"it carries {', '.join(extra)}")
        if args or input_ids is None or labels is None:
            raise _Unserved("it comes without input_ids and labels by keyword")
        try:
            return plan_pairs(input_ids, torch.ones_like(input_ids) if mask is None else mask, labels, self.layout)
        except ValueError as error:
            raise _Unserved(str(error)) from error

    def forward(
        self,
        model: PreTrainedModel,
        plan: PairPlan,
        *,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> FusedCausalLMOutput:
        """TRL's fused forward from one backbone call on the packed row."""
        for config in _attention_configs(model):
            attention.switch_implementation(config)
        router = output_router_logits or getattr(self.text_config, "output_router_logits", False)
        backbone = model.base_model(
            input_ids=input_ids.flatten()[plan.token_index][None],
            position_ids=plan.position_ids,
            # A 4-d mask is passed on as it is; one without elements fails loudly wherever something reads it
            attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            **{PAIR_ATTENTION: PairAttention(plan, self.backend)},
            **({"output_router_logits": True} if router else {}),
        )
        scores = self.score(model, backbone.last_hidden_state[0], plan)
        per_token = {name: plan.scatter(scores[name]) for name in scores}
        log_probs = per_token["log_probs"]
        label_mask = (labels[:, 1:] != -100).to(log_probs.device)
        tokens = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / tokens
        aux_loss = None
        if router:
            # Each token weighs as often as the padded batch repeats it
            aux_loss = load_balancing_loss_func(
                backbone.router_logits,
                self.text_config.num_experts,
                self.text_config.num_experts_per_tok,
                plan.multiplicity,
            )
            loss = loss + getattr(self.text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=label_mask, aux_loss=aux_loss, **per_token)

    def score(self, model: PreTrainedModel, states: Tensor, plan: PairPlan) -> dict[str, Tensor]:
        head = model.get_output_embeddings()  # looked up on each call: FSDP and PEFT replace it after installation
        device = head.weight.device
        hidden = states.index_select(0, plan.score_index.to(states.device)).to(device)
        precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.cast_lm_head_to_fp32:
            hidden = hidden.float()
            precision = torch.autocast(device.type, enabled=False)
        with precision:
            scores = score_tokens(hidden, head.weight, head.bias, plan.targets.to(device), self.transform, self.outputs)
        return {name: value for name, value in vars(scores).items() if value is not None}

    def probe_key(self, model: PreTrainedModel) -> str:
        # The implementation's name is the original one: the model was not switched yet
        return self.cache.key(
            model,
            layout=self.layout,
            backend=self.backend,
            dtype=str(model.dtype),
            device=PartialState().device.type,
            attention=model.config.get_text_config()._attn_implementation,
        )

    def probe(self, model: PreTrainedModel, input_ids: Tensor) -> LayoutReport:
        """Score the probe's pairs in both layouts, and decide."""
        name, key = type(model).__name__, self.probe_key(model)
        limit = probe.tolerance(model.dtype)
        gap = self.known if self.known is not None else _measured.get(key)
        failure = ""
        if gap is None:
            batch = probe.probe_batch(model, input_ids)
            with torch.no_grad(), _evaluating(model), torch.autocast(input_ids.device.type, enabled=False):
                padded = self.padded_forward(**batch, use_cache=False, fused_lm_head=True).log_probs
                try:
                    plan = plan_pairs(batch["input_ids"], batch["attention_mask"], batch["labels"], self.layout)
                    ours = self.forward(model, plan, input_ids=batch["input_ids"], labels=batch["labels"]).log_probs
                    gap = probe.difference(padded, ours, batch["labels"])
                # Whatever an architecture does with a row it was not written for, TRL's forward still serves it
                except Exception as error:
                    failure, gap = f"the packed row fails with {type(error).__name__}: {error}", float("nan")
            gap, failure = max(gather_object([(gap, failure)]), key=lambda result: (result[0] != result[0], result[0]))
            _measured[key] = gap
            if gap == gap and PartialState().is_main_process:
                self.cache.write(key, gap)
        if gap <= limit:
            return LayoutReport(name, self.layout, difference=gap)
        for config in _attention_configs(model):
            attention.restore_implementation(config)
        reason = failure or f"its log-probs differ by {gap:.1e} per token between layouts, more than {limit:.0e}"
        return LayoutReport(name, "padded", reason, gap)


def _unserved_architecture(model: PreTrainedModel) -> str:
    """Why the model cannot run a foreign attention function at all, or nothing."""
    decoder = model.get_decoder()
    if not getattr(decoder, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    other = set(getattr(decoder.config, "layer_types", None) or ()) - _SERVED_LAYERS
    if other:
        return f"it has layers of type {', '.join(sorted(other))}"
    return ""


def _attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs the decoder's layers read their attention implementation from, usually one."""
    decoder = model.get_decoder()
    configs = (getattr(module, "config", None) for module in decoder.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing, each module going back to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@functools.cache
def _log_once(level: int, line: str) -> None:
    """Say each thing once, though policy and reference both have it to say."""
    logger.log(level, line)
