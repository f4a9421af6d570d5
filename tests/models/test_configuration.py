"""A configuration that cannot be read has the same words wherever it is read."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import UserError
from tandem.models.configuration import base_of_adapter, read_config, stored_dtype
from tandem.models.load import check_model, load_tokenizer
from tandem.models.vocabulary import check_vocabulary
from tandem.options.model import LoraOptions, ModelOptions
from tandem.training.foreseen import config_of
from tandem.training.held import held_fine

CODE = {"model_type": "strange", "auto_map": {"AutoConfig": "strange.StrangeConfig"}}
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "torn": (lambda config: json.dumps(config)[:40], "not a valid JSON file"),
    "another_type": (lambda config: json.dumps(config | {"hidden_size": "wide"}), "hidden_size"),
    "unknown": (lambda config: json.dumps(config | {"model_type": "nobodys"}), "nobodys"),
    "code": (lambda config: json.dumps(config | CODE), "which only SFT and DPO run, with --trust_remote_code"),
}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "copy")


def adapter_of(base: Path) -> str:
    """A folder that says it is an adapter on `base`."""
    folder = base.with_name("adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    return str(folder)


def readers(name: str, tiny_model: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a configuration before weights are read."""
    policy = ModelOptions(str(tiny_model))
    return {
        "plan": lambda: config_of(ModelOptions(name)),
        "dtype": lambda: stored_dtype(name),
        "vocabulary": lambda: check_vocabulary(name, policy, load_tokenizer(policy)),
        "held": lambda: held_fine(ModelOptions(name, dtype="auto"), LoraOptions(), {}),
        "check": lambda: check_model(name),
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_the_same_words_for_all_readers(tiny_model: Path, copy: Path, fault: str):
    damaged, said = FAULTS[fault]
    (copy / "config.json").write_text(damaged(json.loads((copy / "config.json").read_text())))
    (copy / "strange.py").write_text("raise SystemExit('was executed')\n")
    adapter = adapter_of(copy)
    asked = [*readers(str(copy), tiny_model).values()]
    asked += [ask for name, ask in readers(adapter, tiny_model).items() if name not in ("held", "check")]
    told = []
    for ask in asked:
        with pytest.raises(UserError, match=said) as refused:
            ask()
        told.append(str(refused.value))
    assert set(told) == {told[0]}
    assert told[0].startswith(f"{copy}: its config cannot be read: ")


def test_trusted_code_is_run_for_each_reader(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    (copy / "strange.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    config = json.loads((copy / "config.json").read_text()) | CODE | {"dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps(config))
    options = ModelOptions(str(copy), trust_remote_code=True, dtype="auto")
    assert type(config_of(options)).__name__ == "StrangeConfig"
    assert type(read_config(adapter_of(copy), trust_remote_code=True)).__name__ == "StrangeConfig"
    assert held_fine(options, LoraOptions(), {}).dtype == "float32"
    check_vocabulary(str(copy), options, load_tokenizer(options))


def test_an_adapter_that_is_its_own_base_is_refused(copy: Path):
    adapter = adapter_of(copy)
    (Path(adapter) / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": adapter}))
    with pytest.raises(UserError, match="names the adapter itself as its base_model_name_or_path"):
        base_of_adapter(adapter)
