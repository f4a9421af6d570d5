"""TRL's fused forward, in which each distinct token of a pair is computed once.

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
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tandem.engine import attention, own_logits
from tandem.engine.attention import PAIR_ATTENTION, PairAttention
from tandem.engine.backbone import backbone, balance_loss, served_by_trl
from tandem.engine.choice import Findings, LayoutChoice, LayoutRequest, attention_configs
from tandem.engine.layout import IGNORED_LABEL, PAIR_LAYOUT, PairLayout, lay_out_pairs
from tandem.engine.logprobs import LogitTransform, score_tokens
from tandem.engine.own_logits import made_by_head

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
    engine = PairEngine(model, padded_forward, choice, temperature, cast_lm_head_to_fp32, outputs)

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
    """Within the block, constructors of TRL's `DPOTrainer` and `SFTTrainer` install the engine where they would install
    TRL's fused forward.

    That is on policy and reference, and before accelerate wraps them: a forward installed around its wrapper would run
    the reference without autocast. SFT's examples are not pairs, and take the layout `packed`. Arguments as in
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
    """One forward of a batch that is laid out already, without a probe. Used to count memory on fake tensors.

    Args:
        model: without adapters around it; they may be in its layers.
        places: of the batch, its tensors of the same kind as the model's.
        input_ids, labels: (2B, S) int64, as in `add_pair_forward`.
        outputs: as in `add_pair_forward`.
    """
    engine = PairEngine(model, model.forward, LayoutChoice(model), 1.0, False, outputs)
    return engine.forward(model, places, input_ids=input_ids, labels=labels)


class _Unserved(Exception):
    """The engine cannot serve this batch, and the padded forward takes it; the message says why."""


class PairEngine:
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
        self.own_forward = padded_forward  # which is the model's own where it is not asked for a fused head
        self.padded_forward = padded_forward if served_by_trl(model) else functools.partial(self.without_trl, model)
        self.choice = choice
        self.text_config = model.config.get_text_config()
        self.transform = LogitTransform.of(self.text_config, temperature)
        self.cast_lm_head_to_fp32 = cast_lm_head_to_fp32
        self.outputs = outputs
        self.looked = False

    def __call__(self, model: PreTrainedModel, made: PairLayout | None, *args: Any, **kwargs: Any) -> Any:
        choice, input_ids = self.choice, kwargs.get("input_ids")
        if choice.report is None and kwargs.get("shift_labels") is not None:
            choice.settle("padded", "context or sequence parallelism cuts its rows")
        if input_ids is not None and not self.looked:
            self.look(model, input_ids)
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

    def look(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        """Find out whether the model's logits are its head's; if not, its own forward makes them from here on."""
        self.looked = True
        known, name = self.choice.findings.made_by_head, self.choice.name
        if name not in known:
            if isinstance(input_ids, FakeTensor):
                return
            try:
                transform = LogitTransform.of(self.text_config)
                known[name] = made_by_head(model, self.own_forward, input_ids, transform)
            except Exception:  # as in the probe: whatever it does with so few tokens, TRL's forward may serve it
                known[name] = True
        if not known[name]:
            self.padded_forward = functools.partial(self.whole_logits, model)
            self.choice.settle("padded", own_logits.REASON)

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
        states = backbone(model)(
            input_ids=input_ids.flatten()[places.token_index][None],
            position_ids=places.position_ids,
            # transformers passes a 4-d mask on as it is, and an empty one fails loudly wherever something reads it
            attention_mask=torch.empty(0, 0, 0, 0, dtype=torch.bool, device=input_ids.device),
            use_cache=False,
            **{PAIR_ATTENTION: PairAttention(places, self.choice.backend)},
            **({"output_router_logits": True} if router else {}),
        )
        hidden = states.last_hidden_state[0]
        scores = self.score(model, hidden.index_select(0, places.score_index.to(hidden.device)), places.targets)
        per_token = {name: places.scatter(scores[name]) for name in scores}
        # Each token weighs as often as the padded batch repeats it
        routed = (getattr(states, "router_logits", None), places.multiplicity) if router else None
        return self.output(per_token, labels[:, 1:] != IGNORED_LABEL, num_items_in_batch, routed)

    def without_trl(self, model: PreTrainedModel, **batch: Any) -> FusedCausalLMOutput:
        """TRL's padded forward of a model that TRL's own code does not serve (`backbone.served_by_trl`)."""

        def score(states: Any, rows: slice, targets: Tensor) -> dict[str, Tensor]:
            hidden = states.last_hidden_state[:, rows]
            scores = self.score(model, hidden.flatten(0, 1), targets.flatten())
            return {name: value.view(targets.shape) for name, value in scores.items()}

        return self.padded(backbone(model), score, **batch)

    def whole_logits(self, model: PreTrainedModel, **batch: Any) -> FusedCausalLMOutput:
        """The padded forward of a model whose logits are not its head's (`own_logits.made_by_head`)."""

        def score(result: Any, rows: slice, targets: Tensor) -> dict[str, Tensor]:
            return own_logits.scores_of(result.logits[:, rows], targets, self.transform.temperature, self.outputs)

        return self.padded(self.own_forward, score, **batch)

    def padded(
        self,
        forward: Callable[..., Any],
        score: Callable[[Any, slice, Tensor], dict[str, Tensor]],
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> FusedCausalLMOutput:
        """A padded batch through `forward`, of whose result `score` gives the scores of targets that rows predict."""
        inputs.pop("fused_lm_head", None)
        router = inputs.get("output_router_logits", getattr(self.text_config, "output_router_logits", False))
        if router:
            inputs["output_router_logits"] = True
        inputs["use_cache"] = False
        result = forward(attention_mask=attention_mask, **inputs)
        rows, targets = slice(None), shift_labels
        if targets is None:
            assert labels is not None
            rows, targets = slice(-1), labels[:, 1:]
        mask = targets != IGNORED_LABEL
        scores = score(result, rows, targets.clamp(min=0))
        per_token = {name: value.masked_fill(~mask.to(value.device), 0) for name, value in scores.items()}
        routed = (getattr(result, "router_logits", None), attention_mask) if router else None
        return self.output(per_token, mask, num_items_in_batch, routed)

    def output(
        self,
        per_token: dict[str, Tensor],
        label_mask: Tensor,
        num_items_in_batch: Tensor | int | None,
        routed: tuple[Any, Tensor | None] | None,
    ) -> FusedCausalLMOutput:
        """TRL's output of (2B, S - 1) fields; `routed` are the routers' logits and how often each token counts."""
        log_probs = per_token["log_probs"]
        label_mask = label_mask.to(log_probs.device)
        tokens = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -log_probs.sum() / tokens
        aux_loss = None
        if routed is not None:
            aux_loss = balance_loss(routed[0], self.text_config, routed[1], like=loss)
            loss = loss + getattr(self.text_config, "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(loss=loss, label_mask=label_mask, aux_loss=aux_loss, **per_token)

    def score(self, model: PreTrainedModel, states: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Fields of `TokenScores` of (M,) `targets`, each predicted by one of the (M, D) `states`."""
        head = model.get_output_embeddings()  # looked up on each call: FSDP and PEFT replace it after installation
        device = head.weight.device
        hidden = states.to(device)
        precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.cast_lm_head_to_fp32:
            hidden = hidden.float()
            precision = torch.autocast(device.type, enabled=False)
        with precision:
            scores = score_tokens(hidden, head.weight, head.bias, targets.to(device), self.transform, self.outputs)
        return {name: value for name, value in vars(scores).items() if value is not None}
