"""Intel Gaudi's software: whether it is here, in which mode, and Intel's forwards in transformers' models.

Imports no torch.
"""

import os
from typing import Any

from tandem import contract


def has_optimum_habana() -> bool:
    """Whether this is the environment of requirements-gaudi.txt."""
    return contract.installed() is contract.GAUDI


def is_lazy() -> bool:
    """Whether Intel's plugin collects operations into graphs, its legacy mode, instead of running them eagerly."""
    return os.environ.get("PT_HPU_LAZY_MODE") == "1"


def few_shapes() -> bool:
    """Whether batches should come in few shapes, as on an HPU, which compiles a program for each. Also on a CPU in
    Gaudi's environment, where this is tested."""
    from tandem.devices import has_hpu

    return has_hpu() or has_optimum_habana()


def prepare() -> None:
    """Put Intel's forwards into transformers' models, where optimum-habana is installed. Before any model is loaded."""
    if not has_optimum_habana():
        return
    from optimum.habana.transformers.modeling_attn_mask_utils import GaudiAttentionMaskConverter
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
    from optimum.habana.transformers.models.gemma2.modeling_gemma2 import GaudiGemma2ForCausalLM
    from optimum.habana.transformers.models.gemma3.modeling_gemma3 import GaudiGemma3ForCausalLM

    stock = GaudiAttentionMaskConverter._make_causal_mask
    if getattr(stock, "exact", False):
        return
    adapt_transformers_to_gaudi()

    # Theirs leaves window + 1 keys to each query, where transformers and the models' authors mean `window`
    def exact(*args: Any, sliding_window: int | None = None, **keywords: Any) -> Any:
        return stock(*args, sliding_window=None if sliding_window is None else sliding_window - 1, **keywords)

    exact.exact = True  # type: ignore[attr-defined]
    GaudiAttentionMaskConverter._make_causal_mask = staticmethod(exact)
    # Theirs has none of its own for text alone, and transformers' then feeds the wrong token into the padded cache
    GaudiGemma3ForCausalLM.prepare_inputs_for_generation = GaudiGemma2ForCausalLM.prepare_inputs_for_generation
