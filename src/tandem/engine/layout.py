"""Where every token of a preference batch goes when each distinct token is forwarded once, in one row.

TRL forwards a batch of B pairs as a padded grid of 2B rows by S columns: row i is prompt + chosen of pair i, row
B + i its prompt + rejected. Both rows of a pair begin with the same tokens, at least the prompt, and a causal model
gives equal prefixes equal hidden states. The plan therefore keeps one row of

    prefix, rest of chosen, rest of rejected   of pair 0, then of pair 1, ...

with nothing padded. A token keeps the position it had in the grid. As attention, every grid row that still has
tokens of its own is one sequence whose queries are its kept tokens and whose keys are all its tokens: bottom-right
aligned causal attention with as many queries as keys for chosen, and fewer queries than keys for rejected.

Everything here is index arithmetic on tensors: no model, no trl, no transformers.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Layout = Literal["shared", "packed", "padded"]
IGNORED_LABEL = -100


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
class PairPlan:
    """Index plan of one batch: T packed tokens, K keys, N sequences, M scored completion tokens. int64 unless said.

    Attributes:
        shape: (2B, S) of the padded grid the plan was made from.
        token_index: (T,) flat index into the grid of every packed token.
        position_ids: (1, T) column each token had in the grid: the position the padded path gives it.
        multiplicity: (1, T) how many grid rows a token stands for, 1 or 2.
        segments: the N sequences, as slices of the packed row.
        key_index: (K,) packed position of every key, sequence after sequence.
        cu_seq_q, cu_seq_k: (N + 1,) int32, cumulative query and key lengths of the sequences.
        max_q, max_k: longest query and key length.
        score_index: (M,) packed position whose hidden state predicts each scored token.
        targets: (M,) the scored tokens.
        score_slots: (M,) flat index of each scored token in a (2B, S - 1) result.
    """

    shape: tuple[int, int]
    token_index: Tensor
    position_ids: Tensor
    multiplicity: Tensor
    segments: tuple[Segment, ...]
    key_index: Tensor
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    score_index: Tensor
    targets: Tensor
    score_slots: Tensor

    @property
    def n_tokens(self) -> int:
        """T, the tokens the backbone forwards."""
        return self.token_index.numel()

    def scatter(self, values: Tensor) -> Tensor:
        """Put (M,) per-token values into the (2B, S - 1) grid TRL reads, zero elsewhere. Keeps the gradient."""
        rows, columns = self.shape
        grid = values.new_zeros(rows * (columns - 1))
        return grid.scatter(0, self.score_slots, values).view(rows, columns - 1)


def plan_pairs(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, layout: Layout = "shared") -> PairPlan:
    """Plan a batch of B pairs.

    Args:
        input_ids: (2B, S) int64; rows i and B + i are chosen and rejected of pair i.
        attention_mask: (2B, S), non-zero on real tokens; each row's real tokens are contiguous, padded on either side.
        labels: (2B, S) int64, the token where it is a completion token and -100 elsewhere.
        layout: `shared` forwards a pair's common prefix once; `packed` keeps every row whole. A pair whose rows start
            at different columns, or with different tokens, shares nothing under either.

    Raises:
        ValueError: an odd number of rows, no token at all, a row with a hole, or a label that no real token precedes.
    """
    rows, columns = input_ids.shape
    if rows % 2:
        raise ValueError(f"a batch of pairs has an even number of rows, not {rows}")
    if layout == "padded":
        raise ValueError("the padded layout has no plan: it is TRL's own forward")
    pairs, device = rows // 2, input_ids.device

    # (B, 2, S): pair-major, so that flattening runs through chosen, rejected of one pair before the next
    def by_pair(grid: Tensor) -> Tensor:
        return grid.view(2, pairs, columns).transpose(0, 1)

    ids, real = by_pair(input_ids), by_pair(attention_mask != 0)
    column = torch.arange(columns, device=device)
    starts = real.long().argmax(-1)
    lengths = real.sum(-1)
    shared = _common_prefix(ids, real, starts, column) if layout == "shared" else torch.zeros_like(lengths[:, 0])

    scored = labels[:, 1:] != IGNORED_LABEL
    mask = attention_mask != 0
    orphans = (scored & ~(mask[:, 1:] & mask[:, :-1])).any()
    holes = (real != ((column >= starts[..., None]) & (column < (starts + lengths)[..., None]))).any()
    # One transfer to the host for all that python has to know
    *sizes, has_orphans, has_holes = torch.cat([lengths.flatten(), shared, orphans.view(1), holes.view(1)]).tolist()
    if has_holes:
        raise ValueError("the attention mask of a row has a hole")
    if has_orphans:
        raise ValueError("a label sits on padding or right behind it, so nothing predicts it")
    segments, kept_rows = _segments(sizes[:rows], sizes[rows:])
    if not segments:
        raise ValueError("the batch has no tokens")

    # The rejected row's part of the prefix is dropped, and stands where chosen's is
    first = starts[:, :1]
    in_prefix = (column >= first) & (column < first + shared[:, None])
    keep = real.clone()
    keep[:, 1] &= ~in_prefix
    packed = (keep.flatten().cumsum(0) - 1).view_as(keep)
    packed[:, 1] = torch.where(in_prefix, packed[:, 0], packed[:, 1])

    grid_index = by_pair(torch.arange(rows * columns, device=device).view(rows, columns))
    attended = real & torch.tensor(kept_rows, device=device).view(pairs, 2, 1)
    packed_of_grid = packed.transpose(0, 1).reshape(rows, columns)
    twice = torch.stack([in_prefix, torch.zeros_like(in_prefix)], dim=1)
    q_lengths = [segment.q_length for segment in segments]
    k_lengths = [segment.k_length for segment in segments]
    return PairPlan(
        shape=(rows, columns),
        token_index=grid_index[keep],
        position_ids=column.expand_as(keep)[keep][None],
        multiplicity=(1 + twice.long())[keep][None],
        segments=segments,
        key_index=packed[attended],
        cu_seq_q=_cumulative(q_lengths, device),
        cu_seq_k=_cumulative(k_lengths, device),
        max_q=max(q_lengths),
        max_k=max(k_lengths),
        score_index=packed_of_grid[:, :-1][scored],
        targets=labels[:, 1:][scored],
        score_slots=scored.flatten().nonzero().squeeze(1),
    )


def _common_prefix(ids: Tensor, real: Tensor, starts: Tensor, column: Tensor) -> Tensor:
    """(B,) number of leading tokens that both rows of a pair have, at the same columns. Takes (B, 2, S) grids."""
    before = column < starts.amax(-1)[:, None]
    same = (ids[:, 0] == ids[:, 1]) & real.all(1)
    length = (same | before).long().cumprod(-1).sum(-1) - starts[:, 0]
    return torch.where((starts[:, 0] == starts[:, 1]) & real.any(-1).all(-1), length, 0)


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


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
