"""Floating point operations that a training step needs in each layout, counted from lengths and shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

Lengths = tuple[int, int, int]  # tokens of prompt, chosen, rejected


@dataclass(frozen=True)
class Shape:
    """What decides a decoder's cost per token."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config) -> "Shape":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.vocab_size,
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of each matrix of a layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, query),
            (self.hidden, key),
            (self.hidden, key),
            (query, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    def forward(self, tokens: float, attended: float, scored: float) -> float:
        """FLOPs of a forward: `tokens` through the layers, `attended` query-key pairs a layer, `scored` head rows."""
        layer = 2 * sum(rows * columns for rows, columns in self.matrices) * tokens
        attention = 4 * self.heads * self.head_dim * attended
        return self.layers * (layer + attention) + 2 * self.hidden * self.vocabulary * scored

    def adapters(self, tokens: float, rank: int) -> float:
        """FLOPs of a forward of `tokens` through LoRA's two matrices beside each matrix of the layers."""
        return self.layers * 2 * rank * sum(rows + columns for rows, columns in self.matrices) * tokens


def tokens(batch: Sequence[Lengths], layout: str) -> int:
    """How many tokens the layers see of a batch of pairs."""
    if layout == "padded":
        return 2 * len(batch) * max(p + max(c, r) for p, c, r in batch)
    return sum((2 if layout == "packed" else 1) * p + c + r for p, c, r in batch)


def batch_forward(shape: Shape, batch: Sequence[Lengths], layout: str) -> float:
    """FLOPs of one forward of a batch of pairs. `padded` is TRL's on CPU, which scores every position."""
    seen = tokens(batch, layout)
    if layout == "padded":
        rows = 2 * len(batch)
        longest = seen // rows
        return shape.forward(seen, seen * (longest + 1) / 2, rows * (longest - 1))
    scored = sum(c + r for _, c, r in batch)
    if layout == "packed":
        return shape.forward(seen, sum(n * (n + 1) / 2 for p, c, r in batch for n in (p + c, p + r)), scored)
    attended = sum((p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2 for p, c, r in batch)
    return shape.forward(seen, attended, scored)


def step(shape: Shape, batch: Sequence[Lengths], layout: str, *, rank: int = 0, reference: bool) -> float:
    """FLOPs of a training step on one batch: forward, backward (2 forwards; 1 where the weights are frozen), and the
    reference's forward unless it is cached. What is computed a second time for the backward is not counted.

    Args:
        rank: of the LoRA adapters on each matrix of the layers; 0 where all weights are trained.
    """
    passes = (2 if rank else 3) + (1 if reference else 0)
    return passes * batch_forward(shape, batch, layout) + 3 * shape.adapters(tokens(batch, layout), rank)
