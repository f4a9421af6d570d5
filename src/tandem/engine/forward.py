"""The seam: TRL's fused forward, computed from each distinct token of a pair once.

`DPOTrainer` calls `model(**batch, labels=labels, fused_lm_head=True)` and reads per-token fields of shape (2B, S - 1)
from a `FusedCausalLMOutput`. `add_pair_forward` binds a forward to the model that answers this call from one packed
row, so that TRL's losses and metrics, PEFT, and the wrappers of DDP, FSDP and DeepSpeed all stay as they are.
"""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tandem.engine import attention
from tandem.engine.attention import PAIR_ATTENTION, PairAttention
from tandem.engine.choice import Findings, LayoutChoice, LayoutRequest, attention_configs
from tandem.engine.layout import PAIR_LAYOUT, PairLayout, lay_out_pairs
from tandem.engine.logprobs import LogitTransform, score_tokens

# What a text batch may pass beside labels; anything else (images, embeddings, positions, a cache) is TRL's to forward
_TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "use_cache", "output_router_logits", "num_items_in_batch"}


def add_pair_forward(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    **asked: Unpack[LayoutRequest],
) -> None:
    """TRL's `add_fused_lm_head`, with the pair engine in front of it.

    `model(input_ids=..., attention_mask=..., labels=..., fused_lm_head=True)` on a (2B, S) batch of pairs, as TRL
    collates them, then runs the backbone once, on one row that holds each distinct token once. It returns TRL's
    fields, with no gradient on `entropy`. A batch may bring its layout, as `pair_layout` (`PairCollator.layout`);
    without one it is laid out here, for which the host waits for the device. Batches and models the engine cannot serve
    take TRL's padded forward, and a line on the logger `tandem.engine` says so. The first such call probes the model
    (see `tandem.engine.probe`). Install it before the model is wrapped by PEFT or accelerate, as TRL does.

    Args:
        model: a causal language model, or a multimodal one that is given text.
        temperature, cast_lm_head_to_fp32, outputs: as in TRL.
        asked: see `LayoutRequest`.
    """
    add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
    padded_forward = model.forward
    choice = LayoutChoice(model, **asked)
    engine = _PairEngine(model, padded_forward, choice, temperature, cast_lm_head_to_fp32, outputs)

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        made = kwargs.pop(PAIR_LAYOUT, None)
        if not fused_lm_head:
            return padded_forward(*args, **kwargs)
        return engine(self, made, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def pair_engine(**asked: Unpack[LayoutRequest]) -> Iterator[None]:
    """While this is open, a `DPOTrainer` or `SFTTrainer` that is built gets the engine where TRL installs its forward.

    That covers policy and reference, and comes before accelerate wraps them: outside its wrapper the reference would
    run without autocast. Examples of SFT are no pairs: theirs is the layout `packed`. Arguments as in
    `add_pair_forward`.
    """
    asked.setdefault("findings", Findings())
    installer = functools.partial(add_pair_forward, **asked)
    modules = (dpo_trainer, sft_trainer)
    originals = [module.add_fused_lm_head for module in modules]
    for module in modules:
        module.add_fused_lm_head = installer
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.add_fused_lm_head = original


def forward_laid_out(
    model: PreTrainedModel, places: PairLayout, input_ids: Tensor, labels: Tensor, outputs: tuple[str, ...]
) -> FusedCausalLMOutput:
    """One forward of a layout that was made elsewhere, without a probe: for counting on tensors that hold no values.

    Args:
        model: without adapters around it; they may be in its layers.
        places: of the batch, its tensors of the same kind as the model's.
        input_ids, labels: (2B, S) int64, as in `add_pair_forward`.
        outputs: as in `add_pair_forward`.
    """
    engine = _PairEngine(model, model.forward, LayoutChoice(model), 1.0, False, outputs)
    return engine.forward(model, places, input_ids=input_ids, labels=labels)


class _Unserved(Exception):
    """This batch is one for the padded forward; the message says why."""


class _PairEngine:
    """The pair forward of one model.

    Args:
        padded_forward: the model's forward as TRL has made it.
        choice: of the layout.
        temperature, cast_lm_head_to_fp32, outputs: as in `add_pair_forward`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padded_forward: Callable[..., Any],
        choice: LayoutChoice,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        outputs: tuple[str, ...],
    ) -> None:
        self.padded_forward = padded_forward
        self.choice = choice
        self.text_config = model.config.get_text_config()
        self.transform = LogitTransform.of(self.text_config, temperature)
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        self.outputs = outputs

    def __call__(self, model: PreTrainedModel, made: PairLayout | None, *args: Any, **kwargs: Any) -> Any:
        choice, input_ids = self.choice, kwargs.get("input_ids")
        if choice.report is None and kwargs.get("shift_labels") is not None:
            choice.settle("padded", "context or sequence parallelism cuts its rows")
        # Whether or not this batch can be served: the batches of other ranks may differ in that
        if input_ids is not None and choice.needs_probe(model, input_ids.shape[1]):
            choice.probe(model, input_ids, self.probe_padded, functools.partial(self.probe_packed, model))
        if not choice.is_padded:
            try:
                places = self.lay_out(made, args, kwargs)
            except _Unserved as reason:
                choice.findings.say_once(logging.WARNING, f"a batch takes the padded forward, because {reason}")
            else:
                return self.forward(model, places, **kwargs)
        return self.padded_forward(*args, fused_lm_head=True, **kwargs)

    def probe_padded(self, batch: dict[str, Tensor]) -> Tensor:
        log_probs: Tensor = self.padded_forward(**batch, use_cache=False, fused_lm_head=True).log_probs
        return log_probs

    def probe_packed(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        places = lay_out_pairs(batch["input_ids"], batch["attention_mask"], batch["labels"], self.choice.layout)
        log_probs: Tensor = self.forward(model, places, input_ids=batch["input_ids"], labels=batch["labels"]).log_probs
        return log_probs

    def lay_out(self, made: PairLayout | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PairLayout:
        extra = sorted(name for name, value in kwargs.items() if value is not None and name not in _TEXT_INPUTS)
        input_ids, labels, mask = (kwargs.get(name) for name in ("input_ids", "labels", "attention_mask"))
        if extra:
            raise _Unserved(f"it carries {', '.join(extra)}")
        if args or input_ids is None or labels is None:
            raise _Unserved("it comes without input_ids and labels by keyword")
        if not self.choice.covers(input_ids.shape[1]):
            raise _Unserved("its rows are longer than those that the probe has seen")
        if made is not None and made.shape == tuple(input_ids.shape):
            return made.to(input_ids.device, non_blocking=True)
        try:
            return lay_out_pairs(
                input_ids, torch.ones_like(input_ids) if mask is None else mask, labels, self.choice.layout
            )
        except ValueError as error:
            raise _Unserved(str(error)) from error

    def forward(
        self,
        model: PreTrainedModel,
        places: PairLayout,
        *,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **_: Any,
    ) -> FusedCausalLMOutput:
        """TRL's fused forward from one backbone call on the packed row."""
        for config in attention_configs(model):
            attention.switch_implementation(config)
        router = output_router_logits or getattr(self.text_config, "output_router_logits", False)
        backbone = model.base_model(
            input_ids=input_ids.flatten()[places.token_index][None],
            position_ids=places.position_ids,
            # A 4-d mask is passed on as it is; one without elements fails loudly wherever something reads it
            attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            **{PAIR_ATTENTION: PairAttention(places, self.choice.backend)},
            **({"output_router_logits": True} if router else {}),
        )
        scores = self.score(model, backbone.last_hidden_state[0], places)
        per_token = {name: places.scatter(scores[name]) for name in scores}
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
                places.multiplicity,
            )
            loss = loss + getattr(self.text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=label_mask, aux_loss=aux_loss, **per_token)

    def score(self, model: PreTrainedModel, states: Tensor, places: PairLayout) -> dict[str, Tensor]:
        head = model.get_output_embeddings()  # looked up on each call: FSDP and PEFT replace it after installation
        device = head.weight.device
        hidden = states.index_select(0, places.score_index.to(states.device)).to(device)
        precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.cast_lm_head_to_fp32:
            hidden = hidden.float()
            precision = torch.autocast(device.type, enabled=False)
        with precision:
            scores = score_tokens(
                hidden, head.weight, head.bias, places.targets.to(device), self.transform, self.outputs
            )
        return {name: value for name, value in vars(scores).items() if value is not None}
