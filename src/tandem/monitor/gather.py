"""Collects the pairs of one optimizer step from all micro-batches and ranks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

ROWS = ("margin", "chosen", "rejected", "kl")  # of MicroBatch.values and of Step.values


@dataclasses.dataclass
class MicroBatch:
    """What the trainer gave for one micro-batch. Tensors stay on the device: nothing here waits for it."""

    pair_ids: list[str]
    values: torch.Tensor
    """(4, B) float32, `ROWS`, in nats; kl is NaN where the trainer has no estimate."""
    loss: torch.Tensor
    """() float32."""
    tokens: torch.Tensor
    """() float32: exact up to 16.7 million tokens in a micro-batch."""
    batch: Callable[[], Mapping[str, Any]] | None
    """The model's inputs, asked for only if an alarm saves them."""
    rows: Sequence[int] | None = None
    """The row of the data that each pair is of, from 0 on; None: each has its own."""

    @classmethod
    def of(
        cls,
        pair_ids: Sequence[str],
        margins: torch.Tensor,
        logps: tuple[torch.Tensor, torch.Tensor],
        loss: torch.Tensor,
        *,
        tokens: int | torch.Tensor = 0,
        kl: torch.Tensor | None = None,
        batch: Callable[[], Mapping[str, Any]] | None = None,
    ) -> "MicroBatch":
        """A micro-batch of B pairs. Does not wait for the device.

        Args:
            margins: (B,) in nats, not scaled by β.
            logps: (B,) each, log π of the chosen and of the rejected answers, nats per answer.
            loss: () the micro-batch's loss.
            tokens: how many tokens were forwarded on this rank.
            kl: (B,) or () estimate of KL(π‖π_ref), nats per answer.
            batch: gives the model's inputs, should an alarm save them.

        Raises:
            ValueError: the number of pair ids is not that of the margins.
        """
        if margins.shape != (len(pair_ids),):
            raise ValueError(f"{len(pair_ids)} pair ids for margins of shape {tuple(margins.shape)}")
        # Filled on the device, since copying a number there would wait for it
        estimate = torch.full_like(margins, torch.nan) if kl is None else kl.expand_as(margins)
        count = tokens if isinstance(tokens, torch.Tensor) else torch.full_like(loss, tokens, dtype=torch.float32)
        return cls(
            pair_ids=list(pair_ids),
            values=torch.stack([row.detach().float() for row in (margins, *logps, estimate)]),
            loss=loss.detach().float().reshape(()),
            tokens=count.detach().float().reshape(()),
            batch=batch,
        )

    @classmethod
    def joined(
        cls, parts: "Sequence[MicroBatch]", order: Sequence[int], batch: Callable[[], Mapping[str, Any]]
    ) -> "MicroBatch":
        """Parts of equal counts as the one micro-batch that they were cut from.

        Args:
            order: the place in it of each of the parts' pairs, one after the other.
            batch: its inputs.
        """
        place = sorted(range(len(order)), key=order.__getitem__)
        pair_ids = [pair for part in parts for pair in part.pair_ids]
        return cls(
            pair_ids=[pair_ids[row] for row in place],
            values=torch.cat([part.values for part in parts], dim=1)[:, place],
            loss=torch.stack([part.loss for part in parts]).mean(),
            tokens=torch.stack([part.tokens for part in parts]).sum(),
            batch=batch,
        )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a run's pairs are dealt to its ranks.

    Attributes:
        epoch_pairs: rows of one epoch over all ranks, a pair each or several, which is the length of the training set;
            None if it has none. Tells padding of the last batch from pairs.
        ranks_per_batch: neighbouring ranks that get the same pairs (tensor parallelism).
        in_order: (epoch, its rows before a step, rows of the step) → the rows in the order of the sampler, where they
            are dealt in another.
    """

    epoch_pairs: int | None = None
    ranks_per_batch: int = 1
    in_order: Callable[[int, int, int], list[int]] | None = None

    def step(self, dealt: "Step", epoch: int, rows_before: int) -> "Step":
        """The pairs of a step of `epoch` in the sampler's order, each once; see `without_repeats`."""
        if self.in_order is not None:
            dealt = dealt.in_order(self.in_order(epoch, rows_before, dealt.n_rows))
        return without_repeats(dealt, rows_before, self.epoch_pairs)


@dataclasses.dataclass(frozen=True)
class Share:
    """One rank's part of an optimizer step, on the host."""

    pair_ids: list[list[str]]
    """Per micro-batch."""
    values: list[NDArray[np.float32]]
    """Per micro-batch, (4, B)."""
    losses: list[float]
    """Per micro-batch."""
    tokens: int
    grad_norm: float | None
    rows: list[Sequence[int] | None] = dataclasses.field(default_factory=list)
    """Per micro-batch, see `MicroBatch`; empty: all are None."""


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step's pairs over all ranks, as they were dealt: by micro-batch, rank, row."""

    pair_ids: list[str]
    values: NDArray[np.float32]
    """(4, n), `ROWS`."""
    sources: list[tuple[int, int]]
    """(rank, micro-batch) of each pair."""
    rows: list[int] = dataclasses.field(default_factory=list)
    """The place of each pair's row of the data among those of the step; empty: each pair has its own."""

    def __post_init__(self) -> None:
        if not self.rows:
            self.rows.extend(range(len(self.pair_ids)))

    @property
    def n_rows(self) -> int:
        """How many rows of the data the pairs are of."""
        return max(self.rows, default=-1) + 1

    @property
    def margins(self) -> NDArray[np.float32]:
        """(n,) in nats."""
        return self.values[0]

    @property
    def finite(self) -> NDArray[np.bool_]:
        """(n,) whether a pair's margin and log-probs are all finite."""
        return np.logical_and.reduce(np.isfinite(self.values[:3]))

    def select(self, pairs: Sequence[int]) -> "Step":
        """Some pairs; their rows keep their places."""
        return Step(
            [self.pair_ids[i] for i in pairs],
            self.values[:, pairs],
            [self.sources[i] for i in pairs],
            [self.rows[i] for i in pairs],
        )

    def in_order(self, order: Sequence[int]) -> "Step":
        """The same rows in another order: the places at which they are now."""
        places = np.argsort(order)
        moved = dataclasses.replace(self, rows=places[self.rows].tolist())
        return moved.select(np.argsort(moved.rows, kind="stable").tolist())


def to_host(micro_batches: Sequence[MicroBatch], grad_norm: float | torch.Tensor | None) -> Share:
    """This rank's share. One transfer, which waits for the device."""
    columns = [micro.values.flatten() for micro in micro_batches]
    columns += [torch.stack([micro.loss, micro.tokens]) for micro in micro_batches]
    if isinstance(grad_norm, torch.Tensor) and micro_batches:
        columns.append(grad_norm.detach().reshape(1).to(columns[0]))
    flat = torch.cat(columns).cpu().numpy() if columns else np.empty(0, np.float32)
    values, at = [], 0
    for micro in micro_batches:
        size = micro.values.numel()
        values.append(flat[at : at + size].reshape(len(ROWS), -1))
        at += size
    losses = flat[at : at + 2 * len(micro_batches) : 2]
    tokens = flat[at + 1 : at + 2 * len(micro_batches) : 2]
    if isinstance(grad_norm, torch.Tensor):
        grad_norm = float(flat[-1])
    return Share(
        pair_ids=[micro.pair_ids for micro in micro_batches],
        values=values,
        losses=losses.tolist(),
        tokens=int(tokens.sum(dtype=np.float64)),
        grad_norm=grad_norm,
        rows=[micro.rows for micro in micro_batches] if any(micro.rows for micro in micro_batches) else [],
    )


def gather_shares(share: Share) -> list[Share]:
    """The shares of all ranks in the order of ranks, the same list on each. Collective."""
    shares: list[Share] = gather_object([share])
    return shares


def assemble(shares: Sequence[Share]) -> Step:
    """All pairs of the shares, padding and repeats included."""
    pair_ids: list[str] = []
    values: list[NDArray[np.float32]] = []
    sources: list[tuple[int, int]] = []
    rows: list[int] = []
    for micro in range(max((len(share.pair_ids) for share in shares), default=0)):
        for rank, share in enumerate(shares):
            if micro < len(share.pair_ids):
                pair_ids += share.pair_ids[micro]
                values.append(share.values[micro])
                sources += [(rank, micro)] * len(share.pair_ids[micro])
                before = rows[-1] + 1 if rows else 0
                own = share.rows[micro] if share.rows else None
                rows += [before + row for row in own or range(len(share.pair_ids[micro]))]
    joined = np.concatenate(values, axis=1) if values else np.empty((len(ROWS), 0), np.float32)
    return Step(pair_ids, joined, sources, rows)


def without_repeats(step: Step, rows_before: int, epoch_pairs: int | None) -> Step:
    """The step with each pair once.

    Two things repeat pairs. Where an epoch does not fill its last global batch, accelerate fills it with the epoch's
    first pairs; the sampler deals `epoch_pairs` rows in an epoch, so the rows beyond them are that padding. (Its own
    count, `gradient_state.remainder`, is lost when a run resumes in mid-epoch.) And a dataset may hold the same pair
    twice: within a step, pairs are told apart by `pair_id` alone, and the first of each is taken.

    Args:
        rows_before: rows of the same epoch in the steps before, padding and repeats included.
        epoch_pairs: rows in an epoch; None if unknown, which leaves the padding in but for repeats in the step.
    """
    pairs = np.arange(len(step.pair_ids))
    if epoch_pairs is not None:
        pairs = pairs[np.array(step.rows, np.int64) + rows_before < epoch_pairs]
    first: dict[str, int] = {}
    for pair in pairs.tolist():
        first.setdefault(step.pair_ids[pair], pair)
    return step.select(list(first.values()))


def grad_norm_of(shares: Sequence[Share]) -> float | None:
    """The step's gradient norm, which all ranks share; if any rank's is not finite, that one."""
    norms = [share.grad_norm for share in shares if share.grad_norm is not None]
    return next((norm for norm in norms if not math.isfinite(norm)), norms[0] if norms else None)
