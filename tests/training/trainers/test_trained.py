"""What of a model an adapter is made on by default, and what the start of a run tells of it."""

import pytest
import transformers
from peft import get_peft_model

from tandem.models.lora import lora_config
from tandem.options.model import LoraOptions
from tandem.training.trainers.sharding import trained

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        (transformers.LlamaConfig(**SIZES, **HEADS), ["k_proj (2)", "gate_proj (2)"]),
        (
            transformers.Mamba2Config(**SIZES, num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2),
            ["in_proj (2)"],
        ),
        (transformers.FalconH1Config(**SIZES, **HEADS, **MAMBA), ["in_proj (2)", "q_proj (2)"]),
    ],
    ids=["llama", "mamba2", "falcon_h1"],
)
def test_an_adapter_by_default(config: transformers.PreTrainedConfig, adapted: list[str]):
    """PEFT takes no adapter on the projection out of a Mamba mixer; the rest gets one, and is named and counted."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert trained(model) == f"{whole:,} of {whole:,} parameters"
    peft = get_peft_model(model, lora_config(LoraOptions(use_peft=True), model=model))
    own = sum(parameter.numel() for name, parameter in peft.named_parameters() if "lora" in name)
    told = trained(peft)
    assert told.startswith(f"{own:,} of {whole + own:,} parameters, the adapter's: ")
    assert all(part in told for part in adapted) and "out_proj" not in told
