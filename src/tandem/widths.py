"""How wide a language model's layers are, from its config: what estimates of time and memory are computed from."""

from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Widths:
    """The sizes in the config of a text model; where layers differ, the largest.

    Attributes:
        heads: number of query heads; 0 where a model has no attention
        groups: number of key and value heads
        head: width of one head
        inner: width of the feed-forward, of one expert's where there are several
        experts: how many experts a token goes through; 1 where there are none
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
        """None where the config does not give the number of layers, their width, or the size of the vocabulary."""
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
    """The largest number that `config` has under `name`, over its layers; 0 where it has none."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers raises for an attribute that differs by layer
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    values = found if isinstance(found, list | tuple) else [found]
    return max((value for value in values if isinstance(value, int)), default=0)
