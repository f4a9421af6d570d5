"""Log-probs are those of the logits that the model itself makes."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.engine.forward import add_pair_forward
from tests import families


@pytest.mark.parametrize("name", ["xlstm", "recurrent_gemma", "modernbert-decoder", "cohere", "llama"])
def test_log_probs_are_those_of_the_models_own_logits(name: str):
    """What a model does before its head or after it is neither in the head's weights nor in settings that TRL reads."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(families.config(name, 300)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # logits so large that a cap shows
    ids = torch.randint(6, 290, (2, 24))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    with torch.no_grad():
        logits = model(**text).logits[:, :-1].float()
        add_pair_forward(model, layout="padded", outputs=outputs)
        output = model(**text, labels=ids.clone(), fused_lm_head=True)
    every = logits.log_softmax(-1)
    expected = {
        "log_probs": every.gather(-1, ids[:, 1:, None])[..., 0],
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "log_sum_sq_probs": every.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == ids[:, 1:],
    }
    for field, value in expected.items():
        torch.testing.assert_close(getattr(output, field), value, atol=1e-4, rtol=1e-4, msg=field)
