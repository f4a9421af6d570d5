"""The loss of a micro-batch of pairs: TRL's losses, those that it lacks, and what a pair's columns make of them."""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from tandem.engine.layout import PAIR_LAYOUT
from tandem.engine.losses import Pairs, pair_losses, rewards
from tandem.engine.modes import evaluating
from tandem.engine.pairs import ROW, sequence_logps
from tandem.options.losses import DPOOptions
from tandem.training.trainers.deferred import DeferredGather, DeferredMetrics
from tandem.training.trainers.monitored import MonitorFeed
from tandem.training.trainers.reference_scorer import ReferenceScorer
from tandem.training.trainers.synced import SyncedReference


@dataclasses.dataclass(frozen=True)
class Given:
    """What the data say of a micro-batch's B pairs beside their tokens.

    Attributes:
        pairs, rows: B, and of how many rows of the data they are.
        weight: (B,) what each pair's loss is multiplied by; None: 1.
        margin: (B,) what its reward margin must exceed, in nats times β; None: 0.
        group: (B,) int64, the row of each pair; None: each has its own.
    """

    pairs: int
    rows: int
    weight: Tensor | None = None
    margin: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def taken_from(cls, inputs: dict[str, Any]) -> Self:
        """From a batch of `PairCollator`, which then has it no more."""
        row = inputs.pop(ROW, None)
        pairs = len(inputs["input_ids"]) // 2
        rows = pairs if row is None else row[-1] + 1
        group = None if row is None else torch.tensor(row, device=inputs["input_ids"].device)
        return cls(pairs, rows, inputs.pop("weight", None), inputs.pop("margin", None), group)

    @property
    def scale(self) -> float:
        """Pairs of a row on average, by which a mean over pairs becomes a mean over rows of their pairs' sums."""
        return self.pairs / self.rows

    def total(self, losses: Tensor) -> Tensor:
        """() mean over rows of what their pairs have, (B,), each times its weight."""
        return (losses if self.weight is None else losses * self.weight).sum() / self.rows


class Objective:
    """Mixin over TRL's DPOTrainer, whose `_compute_loss` has a forward, losses and metrics in one.

    A row with several rejected answers counts as the sum of its pairs' losses, and a micro-batch as the mean of its
    rows. Where all pairs weigh alike, that is TRL's mean times a number. Where they do not, TRL computes each pair's
    loss as that of a batch of its own, from the one forward of all; metrics are those of the whole batch, unweighted.
    """

    model: Any
    accelerator: Any
    beta: float
    ld_alpha: float | None
    loss_types: list[str]
    loss_weights: list[float]
    aux_loss_enabled: bool
    _metrics: Any
    _total_train_tokens: Any
    _dpo: DPOOptions
    reference: ReferenceScorer
    feed: MonitorFeed
    _deferred: DeferredMetrics
    _synced: SyncedReference | None
    """A reference that follows the policy; None where it stays what it is."""
    _logps: Any

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        pair_ids = inputs.pop("pair_id")
        rows = inputs.get(ROW)
        given = Given.taken_from(inputs)
        if self._synced is not None and self._synced.has_moved:
            inputs |= self._scored_now(model, inputs)
        training = self.model.training
        outputs: list[Any] = []

        def policy(*args: Any, **kwargs: Any) -> Any:
            outputs.append(model(*args, **kwargs))
            return outputs[0]

        with self._deferred.put_off() if training else contextlib.nullcontext():
            loss = self._trl_loss(policy, outputs, inputs, given)
            pairs = self._pairs(outputs[0].log_probs, inputs, given)
            for own, weight in self._dpo.own_losses:
                loss = loss + weight * given.total(pair_losses(own, pairs))
            logged = self._log_own_rewards(pairs)
        if training:
            logps = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
            self.feed.add(pair_ids, inputs, logps, loss, logged, rows)
        return loss

    def _scored_now(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The log-probs of a reference that the cache does not know, (B,) nats each."""
        assert self._synced is not None
        with torch.no_grad(), self._synced.in_place(), evaluating(model), self.reference.autocast():
            chosen, rejected = self._logps(model, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _pairs(self, per_token: Tensor, inputs: Mapping[str, Any], given: Given) -> Pairs:
        """What a loss is given, from the policy's (2B, S − 1) log-probs of tokens in nats."""
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = sequence_logps(per_token, mask, self.ld_alpha).chunk(2)
        chosen_lengths, rejected_lengths = mask.sum(1).clamp(min=1).chunk(2)
        scored = self.reference.cache is not None
        return Pairs(
            chosen,
            rejected,
            ref_chosen_logps=inputs["ref_chosen_logps"] if scored else None,
            ref_rejected_logps=inputs["ref_rejected_logps"] if scored else None,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self.beta,
            options=self._dpo,
            weight=given.weight,
            margin=given.margin,
            group=given.group,
        )

    def _log_own_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor] | None:
        """Log the first loss's rewards where TRL has logged others; those of a loss of its own kind are returned."""
        first = self._dpo.losses[0][0]
        if first.rewards is None and pairs.margin is None:
            return None
        chosen, rejected = rewards(first, pairs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, values in {
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).float(),
            "margins": chosen - rejected,
        }.items():
            metrics[f"rewards/{name}"][-1] = self.accelerator.gather(values).mean().item()
        return None if first.rewards is None else (chosen, rejected)

    # TRL's losses

    def _trl_loss(self, policy: Callable[..., Any], outputs: list[Any], inputs: dict[str, Any], given: Given) -> Any:
        """Of its losses and its experts' balance; `outputs` gets what `policy` gives."""
        if given.margin is not None:
            # β(Δ − m/β) = βΔ − m in all losses that go with a margin (`options.losses.Loss.margin`)
            inputs = inputs | {"ref_chosen_logps": inputs["ref_chosen_logps"] + given.margin / self.beta}
        if given.weight is None:
            with self._terms([(name, weight * given.scale) for name, weight in self._asked]):
                return super().compute_loss(policy, inputs)  # type: ignore[misc]
        with self._terms([]):
            loss = super().compute_loss(policy, inputs)  # type: ignore[misc]
        output, mask = outputs[0], inputs["completion_mask"][:, 1:]
        for name, weight in self._asked:
            if name == "sft":  # a mean over the tokens of all chosen answers
                chosen = output.log_probs.chunk(2)[0].sum(1)
                loss = loss - weight * given.scale * (chosen * given.weight).sum() / mask.chunk(2)[0].sum()
        if any(name != "sft" for name, _ in self._asked):
            loss = loss + given.total(self._each_alone(output, inputs))
        return loss

    @property
    def _asked(self) -> list[tuple[str, float]]:
        return list(zip(self.loss_types, self.loss_weights, strict=True))

    @contextlib.contextmanager
    def _terms(self, terms: Sequence[tuple[str, float]]) -> Iterator[None]:
        """TRL's losses are these, each with its weight."""
        before = self.loss_types, self.loss_weights
        self.loss_types, self.loss_weights = [name for name, _ in terms], [weight for _, weight in terms]
        try:
            yield
        finally:
            self.loss_types, self.loss_weights = before

    def _each_alone(self, output: Any, inputs: Mapping[str, Any]) -> Tensor:
        """(B,) TRL's loss of each pair in a batch of its own, without `sft`; from the fields of `output`, (2B, S − 1)
        each, with their gradient."""
        pairs = len(inputs["input_ids"]) // 2
        fields = {name: value for name, value in vars(output).items() if isinstance(value, Tensor) and value.ndim > 1}
        losses = []
        with self._terms([term for term in self._asked if term[0] != "sft"]), self._nothing_logged():
            for pair in range(pairs):
                both = [pair, pairs + pair]
                own = {
                    name: value[both] if len(value) > pairs else value[[pair]]
                    for name, value in inputs.items()
                    if name != PAIR_LAYOUT
                }
                self._total_train_tokens = 0  # which a promise of the pair before may have become
                alone = dataclasses.replace(output, **{name: value[both] for name, value in fields.items()})
                losses.append(super().compute_loss(lambda alone=alone, **_: alone, own))  # type: ignore[misc]
        return torch.stack(losses)

    @contextlib.contextmanager
    def _nothing_logged(self) -> Iterator[None]:
        """TRL's metrics of what is computed here go nowhere, without a collective or a wait for the device."""
        before = self._metrics, self.accelerator, self._total_train_tokens, self.aux_loss_enabled
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.accelerator = DeferredGather(before[1])
        self.aux_loss_enabled = False
        try:
            yield
        finally:
            self._metrics, self.accelerator, self._total_train_tokens, self.aux_loss_enabled = before
