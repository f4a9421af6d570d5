"""The modes of a model's forward: evaluation, and training without dropout."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# In the names of attributes that hold a probability or the size of a noise, as models and adapters have them:
# `attention_dropout`, `attn_pdrop`, `layerdrop`, `drop_path`, `rank_dropout`, `router_jitter_noise`
_DROPS = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob", "attn_drop", "jitter_noise")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` has neither dropout nor gradient checkpointing; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` and its adapters to zero, for good, whether it is a module or a number.

    TRL's `disable_dropout_in_model` knows `nn.Dropout` alone. Others drop by a function, with a probability that is an
    attribute of the layer (OPT, Seed-OSS), skip whole layers (`layerdrop`), or keep a probability for each adapter
    (LoKr's `rank_dropout`).
    """
    for module in model.modules():
        if "dropout" in type(module).__name__.lower() and _is_probability(getattr(module, "p", None)):
            setattr(module, "p", 0.0)  # noqa: B010
        for name, value in vars(module).items():
            if not any(part in name for part in _DROPS):
                continue
            if _is_probability(value):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):
                value.update({key: 0.0 for key, entry in value.items() if _is_probability(entry)})


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
