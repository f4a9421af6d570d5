import pytest
from transformers import CONFIG_MAPPING

from tandem.widths import Widths


@pytest.mark.parametrize(
    ("family", "given", "widths"),
    [
        ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}, Widths(2, 4096, 32_000, 32, 4, 128, 11008, 1)),
        ("qwen3_moe", {"num_experts_per_tok": 8}, Widths(24, 2048, 151_936, 32, 4, 64, 768, 8)),
        # Its layers of full attention have heads of another width than those of a window
        ("gemma4_text", {"head_dim": 64, "global_head_dim": 128}, Widths(30, 2304, 262_144, 8, 4, 128, 9216, 1)),
        ("gemma3n_text", {"intermediate_size": 64}, Widths(35, 2048, 262_400, 8, 2, 256, 64, 1)),  # a list of 35
        ("falcon_mamba", {"num_hidden_layers": 2}, Widths(2, 768, 50_280, 0, 0, 0, 1536, 1)),
        ("blt", {}, None),
    ],
)
def test_of_every_kind_of_config(family: str, given: dict, widths: Widths | None):
    assert Widths.of(CONFIG_MAPPING[family](**given).get_text_config(decoder=True)) == widths
