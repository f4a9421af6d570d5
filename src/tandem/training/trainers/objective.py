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
from tandem.training.trainers.reference_scorer import Logps
from tandem.training.trainers.synced import SyncedReference


@dataclasses.dataclass(frozen=True)
class Given:
    """What a micro-batch has on its B pairs besides their tokens.

    Attributes:
        pairs, rows: B, and the number of rows of the data that they come from.
        weight: (B,) the factor of each pair's loss; None: 1.
        margin: (B,) the amount that its reward margin must exceed, in nats times β; None: 0.
        group: (B,) int64, the row of each pair; None: each has its own.
    """

    pairs: int
    rows: int
    weight: Tensor | None = None
    margin: Tensor | None = None
    group: Tensor | None = None

    @classmethod
    def taken_from(cls, inputs: dict[str, Any]) -> Self:
        """Take it out of a batch of `PairCollator`, which is left without these entries."""
        row = inputs.pop(ROW, None)
        pairs = len(inputs["input_ids"]) // 2
        rows = pairs if row is None else row[-1] + 1
        group = None if row is None else torch.tensor(row, device=inputs["input_ids"].device)
        return cls(pairs, rows, inputs.pop("weight", None), inputs.pop("margin", None), group)

    @property
    def scale(self) -> float:
        """The mean number of pairs in a row: times it, a mean over pairs is the mean over rows of their pairs' sums."""
        return self.pairs / self.rows

    def total(self, losses: Tensor) -> Tensor:
        """() the mean over rows of the weighted sum of their pairs' values, (B,)."""
        return (losses if self.weight is None else losses * self.weight).sum() / self.rows


class Objective:
    """The loss of a DPO trainer's micro-batches.

    A row with several rejected answers counts as the sum of its pairs' losses, and a micro-batch as the mean of its
    rows. Where all pairs have the same weight, that is TRL's mean times a number. Where they do not, TRL computes each
    pair's loss as that of a batch of its own, from the one forward of all; metrics are those of the whole batch,
    unweighted.

    Args:
        trainer: a TRL trainer of pairs, whose `reference` and `feed` are used.
        dpo: its losses.
        trl_loss: (policy, inputs) → (), TRL's mean over the pairs; forwards the policy once, and adds to the trainer's
            metrics.
        logps: (model, inputs) → the log-probs of chosen and of rejected answers, (B,) nats each.
        deferred: keeps what TRL's metrics cost for the next log.
        synced: a reference that follows the policy; None where it stays what it is.
    """

    def __init__(
        self,
        trainer: Any,
        dpo: DPOOptions,
        *,
        trl_loss: Callable[..., Tensor],
        logps: Callable[[Any, Mapping[str, Any]], Logps],
        deferred: DeferredMetrics,
        synced: SyncedReference | None,
    ) -> None:
        self._trainer, self._dpo = trainer, dpo
        self._trl_loss, self._logps = trl_loss, logps
        self._deferred, self._synced = deferred, synced

    def loss(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """() the loss of a batch of `PairCollator`; in training the monitor gets its pairs."""
        inputs = dict(inputs)
        pair_ids = inputs.pop("pair_id")
        rows = inputs.get(ROW)
        given = Given.taken_from(inputs)
        if self._synced is not None and self._synced.has_moved:
            inputs |= self._scored_now(model, inputs)
        training = self._trainer.model.training
        outputs: list[Any] = []

        def policy(*args: Any, **kwargs: Any) -> Any:
            outputs.append(model(*args, **kwargs))
            return outputs[0]

        with self._deferred.put_off() if training else contextlib.nullcontext():
            loss = self._of_trl(policy, outputs, inputs, given)
            pairs = self._pairs(outputs[0].log_probs, inputs, given)
            for own, weight in self._dpo.own_losses:
                loss = loss + weight * given.total(pair_losses(own, pairs))
            logged = self._log_own_rewards(pairs)
        if training:
            logps = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
            self._trainer.feed.add(pair_ids, inputs, logps, loss, logged, rows)
        return loss

    def _scored_now(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The log-probs of a reference that the cache does not know, (B,) nats each."""
        assert self._synced is not None
        with torch.no_grad(), self._synced.in_place(), evaluating(model), self._trainer.reference.autocast():
            chosen, rejected = self._logps(model, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _pairs(self, per_token: Tensor, inputs: Mapping[str, Any], given: Given) -> Pairs:
        """What a loss is given, from the policy's (2B, S − 1) log-probs of tokens in nats."""
        mask = inputs["completion_mask"][:, 1:]
        chosen, rejected = sequence_logps(per_token, mask, self._trainer.ld_alpha).chunk(2)
        chosen_lengths, rejected_lengths = mask.sum(1).clamp(min=1).chunk(2)
        scored = self._trainer.reference.cache is not None
        return Pairs(
            chosen,
            rejected,
            ref_chosen_logps=inputs["ref_chosen_logps"] if scored else None,
            ref_rejected_logps=inputs["ref_rejected_logps"] if scored else None,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            beta=self._trainer.beta,
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
        trainer = self._trainer
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, values in {
            "chosen": chosen,
            "rejected": rejected,
            "accuracies": (chosen > rejected).float(),
            "margins": chosen - rejected,
        }.items():
            metrics[f"rewards/{name}"][-1] = trainer.accelerator.gather(values).mean().item()
        return None if first.rewards is None else (chosen, rejected)

    # TRL's losses

    def _of_trl(self, policy: Callable[..., Any], outputs: list[Any], inputs: dict[str, Any], given: Given) -> Tensor:
        """() the loss of its losses and of its experts' balance; `outputs` gets what `policy` returns."""
        if given.margin is not None:
            # β(Δ − m/β) = βΔ − m in all losses that go with a margin (`options.losses.Loss.margin`)
            inputs = inputs | {"ref_chosen_logps": inputs["ref_chosen_logps"] + given.margin / self._trainer.beta}
        if given.weight is None:
            with self._terms([(name, weight * given.scale) for name, weight in self._asked]):
                return self._trl_loss(policy, inputs)
        with self._terms([]):
            loss = self._trl_loss(policy, inputs)
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
        return list(zip(self._trainer.loss_types, self._trainer.loss_weights, strict=True))

    @contextlib.contextmanager
    def _terms(self, terms: Sequence[tuple[str, float]]) -> Iterator[None]:
        """Within the block, TRL's losses are these, each with its weight."""
        trainer = self._trainer
        before = trainer.loss_types, trainer.loss_weights
        trainer.loss_types, trainer.loss_weights = [name for name, _ in terms], [weight for _, weight in terms]
        try:
            yield
        finally:
            trainer.loss_types, trainer.loss_weights = before

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
                self._trainer._total_train_tokens = 0  # after the pair before it may be a promise of `DeferredGather`
                alone = dataclasses.replace(output, **{name: value[both] for name, value in fields.items()})
                losses.append(self._trl_loss(lambda alone=alone, **_: alone, own))
        return torch.stack(losses)

    @contextlib.contextmanager
    def _nothing_logged(self) -> Iterator[None]:
        """Within the block, TRL's metrics go nowhere, without a collective or a wait for the device."""
        trainer = self._trainer
        before = trainer._metrics, trainer.accelerator, trainer._total_train_tokens, trainer.aux_loss_enabled
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer.accelerator = DeferredGather(before[1])
        trainer.aux_loss_enabled = False
        try:
            yield
        finally:
            trainer._metrics, trainer.accelerator, trainer._total_train_tokens, trainer.aux_loss_enabled = before
