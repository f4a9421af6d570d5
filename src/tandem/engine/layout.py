"""Where every token of a preference batch goes when each distinct token is forwarded once, in one row.

TRL forwards a batch of B pairs as a padded grid of 2B rows by S columns: row i is prompt + chosen of pair i, row
B + i its prompt + rejected. Both rows of a pair begin with the same tokens, at least the prompt, and a causal model
gives equal prefixes equal hidden states. The layout therefore keeps one row of

    prefix, rest of chosen, rest of rejected   of pair 0, then of pair 1, ...

with nothing padded. A token keeps the position it had in the grid. For attention, each grid row that still has tokens
of its own is one sequence: its queries are the tokens it keeps, its keys are all its tokens. That is causal attention
aligned at the bottom right, with as many queries as keys for chosen and fewer for rejected.

Everything here is index arithmetic on tensors: no model, no trl, no transformers.
"""

import functools
import math
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
        indices: (3T + K + 2(N + 1) + 3M,) the tensors below, one after the other.
    """

    shape: tuple[int, int]
    segments: tuple[Segment, ...]
    n_scored: int
    indices: Tensor

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        tokens, keys, scored = self.n_tokens, sum(each.k_length for each in self.segments), self.n_scored
        ends = len(self.segments) + 1
        return self.indices.split([tokens, tokens, tokens, keys, ends, ends, scored, scored, scored])

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
        """(1, T) how many grid rows a token stands for, 1 or 2."""
        return self._parts[2][None]

    @property
    def key_index(self) -> Tensor:
        """(K,) packed position of every key, sequence after sequence; none is there more than twice."""
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
        grid = values.new_zeros(rows * (columns - 1))
        return grid.scatter(0, self.score_slots, values).view(rows, columns - 1)


def lay_out_pairs(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, layout: Layout = "shared") -> PairLayout:
    """Lay out a batch of B pairs.

    Args:
        input_ids: (2B, S) int64; rows i and B + i are chosen and rejected of pair i.
        attention_mask: (2B, S), non-zero on real tokens; each row's real tokens are contiguous, padded on either side.
        labels: (2B, S) int64, the token where it is a completion token and -100 elsewhere.
        layout: `shared` forwards a pair's common prefix once; `packed` keeps every row whole, so that its rows need not
            be pairs. A pair whose rows start at different columns, or with different tokens, shares nothing under
            either.

    Returns:
        The layout, on the device of `input_ids`. Unless that is the host, this waits for the batch once.

    Raises:
        ValueError: an odd number of rows, no token at all, a row with a hole, or a label that no real token precedes.
    """
    shape, device = (input_ids.shape[0], input_ids.shape[1]), input_ids.device
    _check(*shape, layout)
    input_ids, attention_mask, labels = _on_host(input_ids, attention_mask, labels)
    rows, columns = input_ids.shape
    pairs = rows // 2

    # (B, 2, S): pair-major, so that flattening runs through chosen, rejected of one pair before the next
    def by_pair(grid: Tensor) -> Tensor:
        return grid.view(2, pairs, columns).transpose(0, 1)

    mask = attention_mask != 0
    ids, real = by_pair(input_ids), by_pair(mask)
    column = torch.arange(columns)
    starts, lengths = real.long().argmax(-1), real.sum(-1)
    shared = _common_prefix(ids, real, starts, column) if layout == "shared" else torch.zeros_like(lengths[:, 0])

    if (real != ((column >= starts[..., None]) & (column < (starts + lengths)[..., None]))).any():
        raise ValueError("the attention mask of a row has a hole")
    scored = _scored(labels, mask)
    segments, kept_rows = _segments(lengths.flatten().tolist(), shared.tolist())
    if not segments:
        raise ValueError("the batch has no tokens")

    first = starts[:, :1]
    in_prefix = (column >= first) & (column < first + shared[:, None])
    keep, packed = _packed(real, in_prefix)
    grid_index = by_pair(torch.arange(rows * columns).view(rows, columns))
    attended = real & torch.tensor(kept_rows).view(pairs, 2, 1)
    packed_of_grid = packed.transpose(0, 1).reshape(rows, columns)
    twice = torch.stack([in_prefix, torch.zeros_like(in_prefix)], dim=1)
    targets = labels[:, 1:][scored]
    indices = (
        grid_index[keep],
        column.expand_as(keep)[keep],
        (1 + twice.long())[keep],
        packed[attended],
        _cumulative([segment.q_length for segment in segments]),
        _cumulative([segment.k_length for segment in segments]),
        packed_of_grid[:, :-1][scored],
        targets,
        scored.flatten().nonzero().squeeze(1),
    )
    return PairLayout(shape, segments, len(targets), torch.cat(indices)).to(device)


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


def _common_prefix(ids: Tensor, real: Tensor, starts: Tensor, column: Tensor) -> Tensor:
    """(B,) number of leading tokens that both rows of a pair have, at the same columns. Takes (B, 2, S) grids."""
    before = column < starts.amax(-1)[:, None]
    same = (ids[:, 0] == ids[:, 1]) & real.all(1)
    length = (same | before).long().cumprod(-1).sum(-1) - starts[:, 0]
    return torch.where((starts[:, 0] == starts[:, 1]) & real.any(-1).all(-1), length, 0)


def _scored(labels: Tensor, mask: Tensor) -> Tensor:
    """(2B, S − 1) which tokens have a log-prob taken, from (2B, S) grids."""
    scored = labels[:, 1:] != IGNORED_LABEL
    if (scored & ~(mask[:, 1:] & mask[:, :-1])).any():
        raise ValueError("a label sits on padding or right behind it, so nothing predicts it")
    return scored


def _packed(real: Tensor, in_prefix: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2, S) which tokens go into the packed row, and the place there of each real one.

    The rejected row's part of the prefix, (B, S), is dropped, and stands where chosen's is.
    """
    keep = real.clone()
    keep[:, 1] &= ~in_prefix
    places = (keep.flatten().cumsum(0) - 1).view_as(keep)
    places[:, 1] = torch.where(in_prefix, places[:, 0], places[:, 1])
    return keep, places


def _segments(lengths: list[int], shared: list[int]) -> tuple[tuple[Segment, ...], list[bool]]:
    """The sequences of the packed row, and for each row of the pair-major grid whether it became one."""
    segments: list[Segment] = []
    offset = 0
    kept_rows = []
    for pair, prefix in enumerate(shared):
        chosen, rejected = lengths[2 * pair], lengths[2 * pair + 1] - prefix
        branch = offset + chosen
        of_pair = (Segment(offset, branch, offset, offset), Segment(branch, branch + rejected, offset, offset + prefix))
        segments += [segment for segment in of_pair if segment.q_length]
        kept_rows += [bool(segment.q_length) for segment in of_pair]
        offset = branch + rejected
    return tuple(segments), kept_rows


def even_size(tokens: int, limit: int) -> int:
    """Size of the fewest blocks of at most `limit` that hold `tokens`, made even; at least 1."""
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / limit))))


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
