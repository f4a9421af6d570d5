"""Models whose states and experts TRL's own fused forward does not find."""

import pytest
import torch
import transformers

from tandem.engine.forward import add_pair_forward
from tandem.engine.layout import Layout
from tests import families
from tests.engine.tiny_models import VOCABULARY, collate, random_pairs


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("name", ["granitemoe", "granitemoehybrid", "llama4_text", "qwen3_moe", "gpt_oss", "doge"])
def test_what_trls_forward_does_not_serve(name: str, layout: Layout):
    """Log-probs and the balance of experts are those of the model's own forward."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(families.config(name, VOCABULARY)).eval()
    batch = collate(random_pairs(3))
    own = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        plain = model(**inputs, labels=batch["labels"], **own)
        add_pair_forward(model, layout=layout)
        output = model(**batch, use_cache=False, fused_lm_head=True, **own)
    expected = plain.logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:, None].clamp(min=0))[..., 0]
    torch.testing.assert_close(
        output.log_probs, expected.masked_fill(batch["labels"][:, 1:] == -100, 0), atol=1e-5, rtol=1e-5
    )
    if getattr(plain, "aux_loss", None) is not None:
        torch.testing.assert_close(output.aux_loss, plain.aux_loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_experts_that_a_model_is_configured_without(layout: Layout):
    """All layers are dense: there is nothing to balance, though the settings for it are there."""
    config = families.config("qwen3_moe", VOCABULARY)
    config.mlp_only_layers, config.output_router_logits = [0, 1], True
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    add_pair_forward(model, layout=layout)
    with torch.no_grad():
        output = model(**collate(random_pairs(3)), use_cache=False, fused_lm_head=True)
    assert output.aux_loss is None or output.aux_loss == 0
    assert output.log_probs.isfinite().all() and output.log_probs.any()
