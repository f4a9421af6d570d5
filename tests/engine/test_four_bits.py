"""The reference's fingerprint tells each way to hold a model in few bits from the others.

On the CPU's kernels of bitsandbytes, which is an extra of its own; a run in 4 bits takes CUDA.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tandem.engine.precision import computed_in
from tandem.engine.ref_cache import fingerprint, pair_key, source_key
from tandem.options.parsing import parse
from tandem.training.option_sets import DPOOptionSet, classes
from tandem.training.trainers.trl import reference_source
from tests import wide

pytestmark = pytest.mark.slow
HELD: dict[str, dict[str, Any] | None] = {
    "whole": None,
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4_double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_bf16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4_head": {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "o_proj"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the blocks of 64 that share a scale."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the extra `quantization`")
    return wide.save_model(tmp_path_factory.mktemp("wide") / "llama", dtype="float32")


def load(folder: Path, settings: dict[str, Any] | None, dtype: str = "float32") -> Any:
    held = {} if settings is None else {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **settings)}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **held)


def key(model: Any) -> bytes:
    """Of one pair, as the trainer makes it."""
    return pair_key(fingerprint(model), [[1, 2, 3], [1, 2, 4]], [1, 1], str(computed_in(model, "cpu")), None)


def test_each_way_has_its_own_entries(model: Path):
    models = {name: load(model, settings) for name, settings in HELD.items()}
    linear = models["nf4"].model.layers[0].mlp.up_proj
    assert type(linear).__name__ == "Linear4bit"
    assert linear.weight.dtype == torch.uint8
    found = {name: fingerprint(each) for name, each in models.items()}
    alike = [pair for pair in itertools.combinations(found, 2) if found[pair[0]] == found[pair[1]]]
    assert not alike
    keys = {name: key(each) for name, each in models.items()}
    assert len(set(keys.values())) == len(keys)
    for name, settings in HELD.items():  # and the same again
        assert key(load(model, settings)) == keys[name]
    assert key(load(model, HELD["nf4"], "bfloat16")) != keys["nf4"]


def test_its_values_differ_so_that_it_matters(model: Path):
    ids = torch.arange(6, 60)[None]
    with torch.no_grad():
        # The CPU's kernels compute in bfloat16 whatever is asked for, and undo the double quantization
        names = ("whole", "nf4", "fp4", "nf4_head")
        logits = {name: load(model, HELD[name])(ids).logits.float() for name in names}
    for one, other in itertools.combinations(logits, 2):
        assert (logits[one] - logits[other]).abs().max() > 1e-6, (one, other)


def test_no_files_vouch_for_what_was_made_of_them(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """The fingerprint by files, which costs no reading, is for weights as files hold them."""
    flags = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tiny_data), "--output_dir", str(tmp_path)]

    def source(*more: str) -> Any:
        return reference_source(DPOOptionSet(*parse([*flags, *more], classes(DPOOptionSet), prog="test")))

    assert source("--use_peft", "true").files
    in_four_bits = source("--use_peft", "true", "--load_in_4bit", "true")
    assert not in_four_bits.files
    assert source_key(load(tiny_model, None), in_four_bits) is None
