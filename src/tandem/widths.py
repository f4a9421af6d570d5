"""How wide a language model's layers are, as its config tells it; estimates of time and memory begin with that."""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Widths:
    """Of a transformers config of the text model; where layers differ, of the largest.

    Attributes:
        heads: of queries, `groups` of keys and values, `head` numbers each; 0 where a model has no attention.
        inner: of one expert's feed-forward, `experts` of which a token goes through.
    """

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    groups: int
    head: int
    inner: int
    experts: int

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """None where a config does not say how many layers there are, how wide they are, or how many tokens."""
        layers, hidden, vocabulary = (
            _largest(config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
        )
        if not (layers and hidden and vocabulary):
            return None
        heads = _largest(config, "num_attention_heads")
        experts = _largest(config, "num_experts_per_tok") or 1
        inner = _largest(config, "moe_intermediate_size") if experts > 1 else 0
        return cls(
            layers=layers,
            hidden=hidden,
            vocabulary=vocabulary,
            heads=heads,
            groups=_largest(config, "num_key_value_heads") or heads,
            head=_largest(config, "head_dim") or (hidden // heads if heads else 0),
            inner=inner or _largest(config, "intermediate_size") or 4 * hidden,
            experts=experts,
        )


def _largest(config: Any, name: str) -> int:
    """0 where there is no such number."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers: an attribute that differs by layer is asked of the layers
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    values = found if isinstance(found, list | tuple) else [found]
    return max((value for value in values if isinstance(value, int)), default=0)
