"""These tests run in the Gaudi environment: `make test-gaudi`. Elsewhere they skip."""

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HAS_OPTIMUM_HABANA = importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.habana")

collect_ignore_glob = [] if HAS_OPTIMUM_HABANA else ["test_*.py"]

# Read at collection, of the main suite too, whose trainers must stay TRL's
if HAS_OPTIMUM_HABANA:
    os.environ["TANDEM_TRAINERS"] = "gaudi"


def save_gemma(folder: Path) -> Path:
    """A 4-layer Gemma 3 whose sliding window, of 8 tokens, is shorter than every row."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tests import tiny

    text = tiny.tokenizer()
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(text),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; not to be written to."""
    return save_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="session")
def main_python() -> str:
    """The interpreter of the main environment, with TRL 1.16."""
    path = Path(os.environ.get("MAIN_PYTHON", HERE.parents[1] / ".venv" / "bin" / "python"))
    if not path.exists():
        pytest.fail(f"{path}: the main environment is compared with; make setup")
    return str(path)
