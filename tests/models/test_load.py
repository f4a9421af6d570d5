import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tandem.errors import UserError
from tandem.models.load import load_model, load_tokenizer
from tandem.models.lora import lora_config
from tandem.options.model import LoraOptions, ModelOptions
from tests import wide


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(folder)
    return folder


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:200])


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(config))

    return change


def pickled(weights: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        torch.save(load_file(folder / weights), folder / name)
        (folder / weights).unlink()

    return change


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (cut("model.safetensors"), "cannot be loaded as a model: Error while deserializing header"),
    "no weights": (without("model.safetensors"), "cannot be loaded as a model: Error no file named model.safetensors"),
    "pickled weights": (
        pickled("model.safetensors", "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which can run code when it is loaded; convert it",
    ),
    "config cut off": (cut("config.json"), "cannot be loaded as a model: It looks like the config file"),
    "unknown architecture": (
        changed("config.json", model_type="nonsense"),
        "cannot be loaded as a model: The checkpoint you are trying to load has model type `nonsense`",
    ),
    "other shapes": (changed("config.json", hidden_size=64), "cannot be loaded as a model: You set `ignore_mismatched"),
    # transformers loads these two, with random weights where there are none
    "a layer short": (
        changed("config.json", num_hidden_layers=3),
        "not a whole causal language model: 9 weights missing, as model.layers.2.input_layernorm.weight",
    ),
    "not a causal model": (
        changed("config.json", architectures=["LlamaForSequenceClassification"]),
        "not a whole causal language model: 1 weights missing, as score.weight",
    ),
}
ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (
        cut("adapter_model.safetensors"),
        "{folder}: cannot be loaded as an adapter of {model}: Error whi",
    ),
    "no weights": (
        without("adapter_model.safetensors"),
        "{folder}: not an adapter's folder: it has no adapter_model.safetensors",
    ),
    "pickled weights": (
        pickled("adapter_model.safetensors", "adapter_model.bin"),
        "{folder}: adapter_model.bin is a pickle, which can run code when it is loaded; convert it to safetensors",
    ),
    "config cut off": (cut("adapter_config.json"), "{folder}: adapter_config.json cannot be read: "),
    "no base": (
        changed("adapter_config.json", base_model_name_or_path=None),
        "{folder}: adapter_config.json has no base_model_name_or_path",
    ),
    "base gone": (changed("adapter_config.json", base_model_name_or_path="/gone"), "/gone: no such model folder"),
    "other rank": (
        changed("adapter_config.json", r=4),
        "{folder}: cannot be loaded as an adapter of {model}: Error(s) in loading state_dict",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_broken_model(tmp_path: Path, tiny_model: Path, case: str):
    harm, expected = MODELS[case]
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    harm(folder)
    with pytest.raises(UserError) as error:
        load_model(ModelOptions(str(folder)))
    assert str(error.value).startswith(f"{folder}: {expected}")


@pytest.mark.parametrize("case", ADAPTERS)
def test_broken_adapter(tmp_path: Path, tiny_model: Path, adapter: Path, case: str):
    harm, expected = ADAPTERS[case]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    harm(folder)
    with pytest.raises(UserError) as error:
        load_model(ModelOptions(str(folder)))
    assert str(error.value).startswith(expected.format(folder=folder, model=tiny_model))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(tmp_path: Path, tiny_model: Path, name: str):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    cut(name)(folder)
    if name == "tokenizer_config.json":
        (folder / name).write_text("{")
    with pytest.raises(UserError, match=f"^{folder}: no tokenizer can be loaded: "):
        load_tokenizer(ModelOptions(str(folder)))


def test_unknown_attention(tiny_model: Path):
    for name in ("nonsense", "flash_attention_2"):
        with pytest.raises(UserError, match=f"^{tiny_model}: cannot be loaded as a model: "):
            load_model(ModelOptions(str(tiny_model), attn_implementation=name))


def test_a_hub_name_without_a_network():
    with pytest.raises(UserError, match=r"^nobody/nothing: cannot be loaded as a model: We couldn't connect"):
        load_model(ModelOptions("nobody/nothing"))


def test_four_bits_need_their_extra(tiny_model: Path):
    with pytest.raises(UserError, match=r"--load_in_4bit needs bitsandbytes: pip install -e '.\[quantization\]'"):
        load_model(ModelOptions(str(tiny_model)), quantize=True)


def test_an_adapter_takes_the_tokenizer_of_its_base(tiny_model: Path, adapter: Path):
    assert not (adapter / "tokenizer_config.json").exists()
    assert (
        load_tokenizer(ModelOptions(str(adapter))).get_vocab()
        == load_tokenizer(ModelOptions(str(tiny_model))).get_vocab()
    )
    assert load_tokenizer(ModelOptions("gone", tokenizer_name_or_path=str(tiny_model))).pad_token == "</s>"


def test_dtype(tiny_model: Path):
    for name, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        assert load_model(ModelOptions(str(tiny_model), dtype=name)).dtype == expected


def test_lora_options_reach_peft():
    assert lora_config(LoraOptions()) is None
    config = lora_config(LoraOptions(use_peft=True, lora_r=8, lora_alpha=4, lora_target_modules=["q_proj", "v_proj"]))
    assert config is not None
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (8, 4, {"q_proj", "v_proj"})
    every = lora_config(LoraOptions(use_peft=True))
    assert every is not None
    assert every.target_modules == "all-linear"


def test_all_linear_means_the_decoders_layers():
    """Gemma 3's vision tower sees no text, so an adapter there would be saved, and never trained."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = get_peft_model(adapted := wide.gemma3(64, ids), lora_config(LoraOptions(use_peft=True), model=adapted))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 2  # matrices, of the seven of each of two layers
    assert all("language_model" in name for name in trained)
    plain = lora_config(LoraOptions(use_peft=True), model=wide.llama(64, ids))
    assert plain is not None and plain.exclude_modules is None


def test_the_way_out_of_a_pickle(tmp_path: Path, tiny_model: Path):
    """The lines of SECURITY.md, as they stand there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    pickled("model.safetensors", "pytorch_model.bin")(folder)
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    lines = text.split("    python - FOLDER <<'END'\n")[1].split("    END\n")[0]
    program = textwrap.dedent(lines)
    subprocess.run([sys.executable, "-", str(folder)], input=program, text=True, check=True)
    (folder / "pytorch_model.bin").unlink()
    converted = load_model(ModelOptions(model_name_or_path=str(folder))).state_dict()
    for name, weights in load_model(ModelOptions(model_name_or_path=str(tiny_model))).state_dict().items():
        assert torch.equal(converted[name], weights)
