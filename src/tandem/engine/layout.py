"""Where every token of a preference batch goes when each distinct token is forwarded once, in one row.

TRL forwards a batch of B pairs as a padded grid of 2B rows by S columns: row i is prompt + chosen of pair i, row
B + i its prompt + rejected. Both rows of a pair begin with the same tokens, at least the prompt, and a causal model
gives equal prefixes equal hidden states. The layout therefore keeps one row of

    prefix, rest of chosen, rest of rejected   of pair 0, then of pair 1, ...

with nothing padded. Pairs of one group, a prompt and its chosen answer with several rejected ones, share all of that:
prefix, rest of chosen, rest of the first rejected, rest of the second, and so on; the chosen rows of the second and
further pairs are read from the first one's. A token keeps the position it had in the grid. As attention, every grid
row that still has tokens of its own is one sequence whose queries are its kept tokens and whose keys are all its
tokens: bottom-right aligned causal attention with as many queries as keys for chosen, and fewer queries than keys for
rejected.

Everything here is index arithmetic on tensors: no model, no trl, no transformers.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["shared", "packed", "padded"]
IGNORED_LABEL = -100
PAIR_LAYOUT = "pair_layout"
"""Name of a layout in a batch, and of the forward's argument."""


class Segment(NamedTuple):
    """One causal sequence of the packed row: its keys are `[prefix_start, prefix_end)` then `[start, end)`.

    Its queries are `[start, end)` alone. The segments follow each other without a gap. A prefix begins where an earlier
    segment does; it is empty for chosen, and for a pair that shares nothing.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int

    @property
    def q_length(self) -> int:
        return self.end - self.start

    @property
    def k_length(self) -> int:
        return self.q_length + self.prefix_end - self.prefix_start


@dataclass(frozen=True, eq=False)
class PairLayout:
    """Places of one batch: T packed tokens, K keys, N sequences, M scored completion tokens. int64 unless said.

    Sizes are Python's numbers and all tensors are views of one, so that a layout made by a data loader is copied to the
    device at once, and no step waits for the device to learn a size.

    Attributes:
        shape: (2B, S) of the padded grid the layout was made from.
        segments: the N sequences, as slices of the packed row.
        n_scored: M.
        indices: (3T + K + 2(N + 1) + 3M,) the tensors below, one after the other; with copies 2B more.
        has_copies: whether rows of the grid repeat others: they are not scored again.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    n_scored: int
    indices: Tensor
    has_copies: bool = False

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        tokens, keys, scored = self.n_tokens, sum(each.k_length for each in self.segments), self.n_scored
        ends = len(self.segments) + 1
        rows = self.shape[0] if self.has_copies else 0
        return self.indices.split([tokens, tokens, tokens, keys, ends, ends, scored, scored, scored, rows])

    @property
    def token_index(self) -> Tensor:
        """(T,) flat index into the grid of every packed token."""
        return self._parts[0]

    @property
    def position_ids(self) -> Tensor:
        """(1, T) column each token had in the grid: the position the padded path gives it."""
        return self._parts[1][None]

    @property
    def multiplicity(self) -> Tensor:
        """(1, T) how many grid rows a token stands for."""
        return self._parts[2][None]

    @property
    def key_index(self) -> Tensor:
        """(K,) packed position of every key, sequence after sequence; without groups none more than twice."""
        return self._parts[3]

    @functools.cached_property
    def cu_seq_q(self) -> Tensor:
        """(N + 1,) int32, cumulative query lengths of the sequences."""
        return self._parts[4].to(torch.int32)

    @functools.cached_property
    def cu_seq_k(self) -> Tensor:
        """(N + 1,) int32, cumulative key lengths of the sequences."""
        return self._parts[5].to(torch.int32)

    @property
    def score_index(self) -> Tensor:
        """(M,) packed position whose hidden state predicts each scored token; none is there more than twice."""
        return self._parts[6]

    @property
    def targets(self) -> Tensor:
        """(M,) the scored tokens."""
        return self._parts[7]

    @property
    def score_slots(self) -> Tensor:
        """(M,) flat index of each scored token in a (2B, S - 1) result."""
        return self._parts[8]

    @functools.cached_property
    def n_tokens(self) -> int:
        """T, the tokens the backbone forwards."""
        return sum(segment.q_length for segment in self.segments)

    @functools.cached_property
    def max_q(self) -> int:
        """The most queries of a sequence."""
        return max(segment.q_length for segment in self.segments)

    @functools.cached_property
    def max_k(self) -> int:
        """The most keys of a sequence."""
        return max(segment.k_length for segment in self.segments)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PairLayout":
        """The layout on `device`. Data loaders call this as they do a tensor's."""
        return replace(self, indices=self.indices.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PairLayout":
        """The layout in page-locked memory, from which a copy to the device does not wait. Data loaders call this."""
        return replace(self, indices=self.indices.pin_memory())

    def scatter(self, values: Tensor) -> Tensor:
        """Put (M,) per-token values into the (2B, S - 1) grid TRL reads, zero elsewhere. Keeps the gradient."""
        rows, columns = self.shape
        flat = values.new_zeros(rows * (columns - 1))
        grid = flat.scatter(0, self.score_slots, values).view(rows, columns - 1)
        return grid.index_select(0, self._parts[9].to(grid.device)) if self.has_copies else grid


def lay_out_pairs(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    layout: Layout = "shared",
    groups: Sequence[int] | None = None,
) -> PairLayout:
    """Lay out a batch of B pairs.

    Args:
        input_ids: (2B, S) int64; rows i and B + i are chosen and rejected of pair i.
        attention_mask: (2B, S), non-zero on real tokens; each row's real tokens are contiguous, padded on either side.
        labels: (2B, S) int64, the token where it is a completion token and -100 elsewhere.
        layout: `shared` forwards a pair's common prefix once; `packed` keeps every row whole, so that its rows need not
            be pairs. A pair whose rows start at different columns, or with different tokens, shares nothing under
            either.
        groups: B numbers; pairs with the same share what all of them begin with. None: each pair is alone.

    Returns:
        The layout, on the device of `input_ids`. Unless that is the host, this waits for the batch once.

    Raises:
        ValueError: an odd number of rows, no token at all, a row with a hole, or a label that no real token precedes.
    """
    shape, device = (input_ids.shape[0], input_ids.shape[1]), input_ids.device
    _check(*shape, layout)
    ids, mask, labels = _on_host(input_ids, attention_mask, labels)
    rows = _Rows.of(ids, mask != 0, groups if layout == "shared" else None, shares=layout == "shared")
    scored = _scored(labels, mask != 0)
    segments, is_sequence = _segments(rows)
    if not segments:
        raise ValueError("the batch has no tokens")
    source = rows.copied_from(labels) if groups is not None and layout == "shared" else None
    if source is not None:
        scored &= (source == torch.arange(len(source)))[:, None]

    keep, places = rows.packed()
    on_grid = torch.empty_like(places)
    on_grid[rows.order] = places
    attended = rows.real & torch.tensor(is_sequence)[:, None]
    targets = labels[:, 1:][scored]
    indices = [
        torch.arange(ids.numel()).view_as(ids)[rows.order][keep],
        rows.column.expand_as(keep)[keep],
        rows.multiplicity()[keep],
        places[attended],
        _cumulative([segment.q_length for segment in segments]),
        _cumulative([segment.k_length for segment in segments]),
        on_grid[:, :-1][scored],
        targets,
        scored.flatten().nonzero().squeeze(1),
    ]
    indices += [] if source is None else [source]
    return PairLayout(shape, segments, len(targets), torch.cat(indices), source is not None).to(device)


def _check(rows: int, columns: int, layout: Layout) -> None:
    if rows % 2 and layout == "shared":
        raise ValueError(f"a batch of pairs has an even number of rows, not {rows}")
    if layout == "padded":
        raise ValueError("the padded layout has no places: it is TRL's own forward")
    if not columns:
        raise ValueError("the batch has no tokens")


def _on_host(*grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels on the host, where the rest is quickest, with an even number of rows.

    Where nothing is shared any two rows make a pair, and an odd last one gets a row without tokens beside it.
    """
    if grids[0].device.type != "cpu":
        grids = torch.stack(grids).cpu().unbind()
    if len(grids[0]) % 2:
        fills = (0, 0, IGNORED_LABEL)
        grids = tuple(
            torch.cat([grid, grid.new_full((1, grid.shape[1]), fill)]) for grid, fill in zip(grids, fills, strict=True)
        )
    ids, mask, labels = grids
    return ids, mask, labels


@dataclass(frozen=True, eq=False)
class _Rows:
    """The 2B rows of a batch in the order in which they are packed: chosen, rejected of one pair before the next.

    Attributes:
        order: (2B,) row of the grid.
        ids, real: (2B, S) tokens, and where there are any.
        base: (2B,) the row that each shares its beginning with: an earlier one, or itself.
        starts, lengths, shared: (2B,) column of the first token, number of tokens, and how many the base has too.
    """

    order: Tensor
    ids: Tensor
    real: Tensor
    base: Tensor
    starts: Tensor
    lengths: Tensor
    shared: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, groups: Sequence[int] | None, *, shares: bool) -> "_Rows":
        """Of a grid. Raises ValueError: a row has a hole."""
        pairs = len(ids) // 2
        order = torch.arange(2 * pairs).view(2, pairs).t().flatten()
        base = torch.arange(2 * pairs)
        if shares:
            first: dict[int, int] = {}
            labels = range(pairs) if groups is None else groups
            base = 2 * torch.tensor([first.setdefault(label, pair) for pair, label in enumerate(labels)])
            base = base.repeat_interleave(2)
        ids, real = ids[order], mask[order]
        column = torch.arange(ids.shape[1])
        starts, lengths = real.long().argmax(-1), real.sum(-1)
        if (real != ((column >= starts[:, None]) & (column < (starts + lengths)[:, None]))).any():
            raise ValueError("the attention mask of a row has a hole")
        return cls(order, ids, real, base, starts, lengths, _common_prefix(ids, real, starts, base))

    @property
    def column(self) -> Tensor:
        """(S,)"""
        return torch.arange(self.ids.shape[1])

    @functools.cached_property
    def in_prefix(self) -> Tensor:
        """(2B, S) which tokens stand in the base already."""
        start = self.starts[:, None]
        return (self.column >= start) & (self.column < start + self.shared[:, None])

    def packed(self) -> tuple[Tensor, Tensor]:
        """(2B, S) which tokens go into the packed row, and the place there of each real one, be it the base's."""
        keep = self.real & ~self.in_prefix
        places = (keep.flatten().cumsum(0) - 1).view_as(keep)
        return keep, torch.where(self.in_prefix, places[self.base], places)

    def multiplicity(self) -> Tensor:
        """(2B, S) how many rows a token that is packed stands for."""
        return torch.ones_like(self.ids).index_add(0, self.base, self.in_prefix.long())

    def copied_from(self, labels: Tensor) -> Tensor | None:
        """(2B,) for each row of the grid the one that its log-probs are read from; None where all are their own.

        A chosen row is read from its group's first where it has the same tokens and the same labels, (2B, S).
        """
        own = torch.arange(len(self.base))
        labels = labels[self.order]
        whole = (self.shared == self.lengths) & (self.lengths == self.lengths[self.base])
        copied = whole & (labels == labels[self.base]).all(-1) & (own % 2 == 0) & (self.base != own)
        if not copied.any():
            return None
        source = torch.empty_like(own)
        source[self.order] = self.order[torch.where(copied, self.base, own)]
        return source


def _common_prefix(ids: Tensor, real: Tensor, starts: Tensor, base: Tensor) -> Tensor:
    """(2B,) number of leading tokens that each row and its base have, at the same columns; of a base itself 0."""
    before = torch.arange(ids.shape[1]) < torch.maximum(starts, starts[base])[:, None]
    same = (ids == ids[base]) & real & real[base]
    length = (same | before).long().cumprod(-1).sum(-1) - starts
    has_both = real.any(-1) & real[base].any(-1) & (starts == starts[base])
    return torch.where(has_both & (base != torch.arange(len(base))), length, 0)


def _scored(labels: Tensor, mask: Tensor) -> Tensor:
    """(2B, S − 1) which tokens have a log-prob taken, from (2B, S) grids."""
    scored = labels[:, 1:] != IGNORED_LABEL
    if (scored & ~(mask[:, 1:] & mask[:, :-1])).any():
        raise ValueError("a label sits on padding or right behind it, so nothing predicts it")
    return scored


def _segments(rows: _Rows) -> tuple[tuple[Segment, ...], list[bool]]:
    """The sequences of the packed row, and for each of `rows` whether it became one."""
    segments: list[Segment] = []
    begins: list[int] = []
    offset = 0
    for length, prefix, base in zip(rows.lengths.tolist(), rows.shared.tolist(), rows.base.tolist(), strict=True):
        begins.append(offset)
        end = offset + length - prefix
        prefix_start = begins[base] if prefix else offset
        segments.append(Segment(offset, end, prefix_start, prefix_start + prefix))
        offset = end
    is_sequence = [bool(segment.q_length) for segment in segments]
    return tuple(segment for segment in segments if segment.q_length), is_sequence


def even_size(tokens: int, limit: int) -> int:
    """Size of the fewest blocks of at most `limit` that hold `tokens`, made even; at least 1."""
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / limit))))


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
